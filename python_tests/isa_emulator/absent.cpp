// Every kernel of every instruction set, absent, where the build has none: dispatch.cpp names all.
#include <stdexcept>

#include "cpu/kernels.h"

#define W2W_ABSENT(isa, kernel, Params)                                     \
    __attribute__((weak)) void isa::kernel(const Params&, int) {            \
        throw std::runtime_error(#isa "::" #kernel " is not in this build"); \
    }
#define W2W_SET(isa)                                 \
    W2W_ABSENT(isa, reconstruct, ReconstructParams)  \
    W2W_ABSENT(isa, project, ProjectParams)          \
    W2W_ABSENT(isa, low_rank, LowRankParams)         \
    W2W_ABSENT(isa, outer, OuterParams)              \
    W2W_ABSENT(isa, merge, MergeParams)              \
    W2W_ABSENT(isa, edit, EditParams)

namespace w2w::cpu {
W2W_SET(portable)
W2W_SET(avx2)
W2W_SET(avx512)
W2W_SET(avx512_vnni)
W2W_SET(avx512_bf16)
}  // namespace w2w::cpu
