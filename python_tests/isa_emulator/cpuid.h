// A processor with AVX-512 BF16 and VNNI, for cpu/dispatch.cpp to ask. What the variable
// W2W_EMULATED_LACK names it has not: zmm (saved by the operating system), vnni, bf16, or leaf 1.
#pragma once

#include <cstdlib>
#include <cstring>

namespace emulator {
inline bool has(const char* what) {
    const char* lack = std::getenv("W2W_EMULATED_LACK");
    return !lack || std::strcmp(lack, what) != 0;
}
}  // namespace emulator

inline int __get_cpuid_count(unsigned leaf, unsigned part, unsigned* a, unsigned* b, unsigned* c,
                             unsigned* d) {
    *a = *b = *c = *d = 0;
    if (leaf == 1) *c = 1u << 12 | 1u << 27 | 1u << 29;  // FMA, OSXSAVE, F16C
    if (leaf == 7 && part == 0) {
        *a = emulator::has("leaf");                             // the last part
        *b = 1u << 5 | 1u << 16 | 1u << 30 | 1u << 31;          // AVX2, AVX-512 F, BW, VL
        *c = (emulator::has("vnni") ? 1u << 11 : 0u) | 1u << 1;  // and one that nobody asks for
    }
    if (leaf == 7 && part == 1) *a = emulator::has("bf16") ? 1u << 5 : 0u;
    return 1;
}
inline int __get_cpuid(unsigned leaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
    return __get_cpuid_count(leaf, 0, a, b, c, d);
}

// xgetbv, the only instruction that dispatch.cpp writes out.
#define __asm__(...) (xcr0 = emulator::has("zmm") ? 0xe7 : 0x07, high = 0)
