// csrc/cuda/ptx.cuh in plain C++, written from the PTX documentation.
#pragma once

#include <cuda_runtime.h>

namespace w2w::cuda {

inline unsigned char* shared_memory() { return emulator::g_block->shared.get(); }

inline float f16_to_f32(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.f : 1.f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction),
                             (exponent ? exponent : 1) - 25);
}

// To nearest even: to a multiple of the unit that a number of this size has.
inline std::uint16_t to_f16(float value) {
    const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
    if (std::isnan(value)) return 0x7FFF;
    const float size = std::fabs(value);
    if (size == 0.f) return sign;
    if (size >= 65520.f) return sign | 0x7C00;
    int exponent = 0;
    std::frexp(size, &exponent);  // size in [2^(exponent-1), 2^exponent)
    const int unit = std::max(exponent, -13) - 11;
    auto units = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));  // up to 2048
    return static_cast<std::uint16_t>(sign | (units + (unit + 24) * 1024));
}

inline std::uint16_t to_bf16(float value) {
    if (std::isnan(value)) return 0x7FFF;
    const std::uint32_t bits = __float_as_uint(value);
    return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline std::uint32_t to_f16x2(float low, float high) {
    return to_f16(low) | std::uint32_t{to_f16(high)} << 16;
}
inline std::uint32_t to_bf16x2(float low, float high) {
    return to_bf16(low) | std::uint32_t{to_bf16(high)} << 16;
}

// Half `half` of a word of two bf16.
inline float bf16(std::uint32_t word, int half) {
    return __uint_as_float(half ? word & 0xFFFF0000u : word << 16);
}

inline std::uint32_t add_bf16x2(std::uint32_t a, std::uint32_t b) {
    return to_bf16x2(bf16(a, 0) + bf16(b, 0), bf16(a, 1) + bf16(b, 1));
}

// Products are exact. All that is summed is cut to what lies 24 bits or less below the largest, and
// the sum is cut to float32: at least what the tensor cores of sm_80 and later keep.
inline float cut_sum(const double* terms, int n) {
    double largest = 0, sum = 0;
    bool finite = true;
    for (int i = 0; i < n; ++i) {
        finite = finite && std::isfinite(terms[i]);
        largest = std::fmax(largest, std::fabs(terms[i]));
    }
    const double unit = std::ldexp(1., std::ilogb(largest > 0 && finite ? largest : 1.) - 24);
    for (int i = 0; i < n; ++i) sum += finite ? std::trunc(terms[i] / unit) * unit : terms[i];
    const auto near = static_cast<float>(sum);
    return finite && std::fabs(static_cast<double>(near)) > std::fabs(sum)
               ? std::nextafter(near, 0.f)
               : near;
}

inline void mma(float (&acc)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
    struct Words {
        std::uint32_t a[4], b[2];
    };
    const Words* lanes = emulator::exchange(Words{{a0, a1, a2, a3}, {b0, b1}}, "mma");
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        double terms[17] = {acc[i]};
        for (int k = 0; k < 16; ++k) {
            // A's lane holds row % 8 and k % 8 / 2; which word: a1 and a3 lower rows, a2 and a3 k
            // >= 8.
            const Words& from_a = lanes[row % 8 * 4 + k % 8 / 2];
            const Words& from_b = lanes[column * 4 + k % 8 / 2];
            terms[k + 1] = static_cast<double>(bf16(from_a.a[row / 8 + k / 8 * 2], k % 2)) *
                           static_cast<double>(bf16(from_b.b[k / 8], k % 2));
        }
        acc[i] = cut_sum(terms, 17);
    }
}

template <int BYTES>
void copy_async(void* shared, const void* global, int inside) {
    if (reinterpret_cast<std::uintptr_t>(shared) % BYTES ||
        reinterpret_cast<std::uintptr_t>(global) % BYTES || inside < 0 || inside > BYTES)
        emulator::g_block->error = "a copy that is not aligned to its size";
    // From now on it may land at any time: who still reads what was there has not waited.
    std::memset(shared, 0xFF, BYTES);
    emulator::self().copies.back().push_back({shared, global, BYTES, inside});
}

inline void copies_commit() { emulator::self().copies.emplace_back(); }

// As late as allowed: a read of what was not waited for finds what was there before.
template <int NEWEST>
void copies_wait() {
    auto& groups = emulator::self().copies;
    while (groups.size() > NEWEST + 1) {  // the last one is not committed
        for (const auto& copy : groups.front()) {
            std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
            if (copy.inside) std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.inside));
        }
        groups.erase(groups.begin());
    }
}

}  // namespace w2w::cuda
