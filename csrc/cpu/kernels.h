// What the kernel files offer to dispatch.cpp, once per instruction set.
#pragma once

#include "../adapted_linear.h"
#include "../edit.h"
#include "../merge.h"
#include "../project.h"
#include "../reconstruct.h"

#define W2W_KERNELS(isa)                              \
    namespace isa {                                   \
    void reconstruct(const ReconstructParams&, int);  \
    void project(const ProjectParams&, int);          \
    void low_rank(const LowRankParams&, int);         \
    void outer(const OuterParams&, int);              \
    void merge(const MergeParams&, int);              \
    void edit(const EditParams&, int);                \
    }

namespace w2w::cpu {

W2W_KERNELS(portable)
W2W_KERNELS(avx2)
W2W_KERNELS(avx512)
W2W_KERNELS(avx512_vnni)  // reconstruct alone
W2W_KERNELS(avx512_bf16)

}  // namespace w2w::cpu
