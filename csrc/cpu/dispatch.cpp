// Which instruction set this machine runs, and the entry of each op.
#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>

#include "isa.h"
#include "kernels.h"

#ifdef W2W_X86
#include <cpuid.h>
#endif

namespace w2w::cpu {
namespace {

#ifdef W2W_X86
struct X86 {
    bool avx2 = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false;

    X86() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool fma = c & (1u << 12), osxsave = c & (1u << 27), f16c = c & (1u << 29);
        if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        // The processor's word is not enough: the operating system must save the registers.
        unsigned xcr0, high;
        __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
        const bool saves_ymm = (xcr0 & 0x06) == 0x06, saves_zmm = (xcr0 & 0xe6) == 0xe6;
        const unsigned f = 1u << 16, bw = 1u << 30, vl = 1u << 31;
        avx2 = saves_ymm && fma && f16c && (b & (1u << 5));
        avx512 = avx2 && saves_zmm && (b & f) && (b & bw) && (b & vl);
        avx512_vnni = avx512 && (c & (1u << 11));
        if (a == 0 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
        avx512_bf16 = avx512_vnni && (a & (1u << 5));
    }
};
const X86 x86;
#endif

struct Isa {
    const char* name;
    bool supported;
    void (*reconstruct)(const ReconstructParams&, int);
    void (*project)(const ProjectParams&, int);
    void (*low_rank)(const LowRankParams&, int);
    void (*outer)(const OuterParams&, int);
    void (*merge)(const MergeParams&, int);
    void (*edit)(const EditParams&, int);
};

// A set with a reconstruct of its own, and the one that has the other kernels.
#define W2W_ISA_ROW(isa, supported, others)                                                       \
    {                                                                                             \
        #isa, supported, isa::reconstruct, others::project, others::low_rank, others::outer,      \
            others::merge, others::edit                                                           \
    }

const Isa kIsas[] = {  // best first
#ifdef W2W_X86_STORED
    W2W_ISA_ROW(avx512_bf16, x86.avx512_bf16, avx512),
    W2W_ISA_ROW(avx512_vnni, x86.avx512_vnni, avx512),
#endif
#ifdef W2W_X86
    W2W_ISA_ROW(avx512, x86.avx512, avx512),
    W2W_ISA_ROW(avx2, x86.avx2, avx2),
#endif
    W2W_ISA_ROW(portable, true, portable),
};

std::atomic<const Isa*> in_use{
    std::find_if(std::begin(kIsas), std::end(kIsas), [](const Isa& isa) { return isa.supported; })};

// On a GPU an index is not looked at before it is used; here looking costs nothing.
void check(const std::int64_t* index, std::int64_t samples, std::int64_t adapters) {
    for (std::int64_t b = 0; index && b < samples; ++b)
        if (index[b] < 0 || index[b] >= adapters)
            throw std::invalid_argument("index: wanted 0 to " + std::to_string(adapters - 1) +
                                        ", got " + std::to_string(index[b]));
}

}  // namespace

void reconstruct(const ReconstructParams& p, int threads) {
    in_use.load()->reconstruct(p, threads);
}

void project(const ProjectParams& p, int threads) { in_use.load()->project(p, threads); }

void low_rank(const LowRankParams& p, int threads) {
    check(p.index, p.samples, p.adapters);
    in_use.load()->low_rank(p, threads);
}

void outer(const OuterParams& p, int threads) {
    check(p.index, p.samples, p.adapters);
    in_use.load()->outer(p, threads);
}

void merge(const MergeParams& p, int threads) { in_use.load()->merge(p, threads); }

void edit(const EditParams& p, int threads) { in_use.load()->edit(p, threads); }

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) names.emplace_back(isa.name);
    return names;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas)
        if (isa.supported) names.emplace_back(isa.name);
    return names;
}

std::string isa() { return in_use.load()->name; }

void set_isa(const std::string& name) {
    for (const Isa& isa : kIsas)
        if (isa.supported && name == isa.name) {
            in_use.store(&isa);
            return;
        }
    std::string wanted;
    for (const std::string& s : supported_isas()) wanted += (wanted.empty() ? "" : ", ") + s;
    throw std::invalid_argument("isa: wanted one of " + wanted + ", got " + name);
}

}  // namespace w2w::cpu
