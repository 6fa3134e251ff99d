// dot.h by the instructions that multiply V's numbers as they are stored, a line of 64 bytes at a
// time: vpdpbusd fours of bytes into i32, vdpbf16ps pairs of bf16 into f32. `keep` brings a row of
// c into the form they take, unless its result would suffer: such a row stays f32.
#pragma once

#include "coefficients.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// A column of c for V of integers, in fixed point: four signed bytes, limb l times 2^8l. Those of
// a line of V lie as its own bytes do, limb after limb. Before a chunk of columns is a line that
// says by how much V's offset makes its sum too large.
struct Fixed {
    std::int8_t limbs[4];
};
constexpr int kHeader = 64 / sizeof(Fixed);

inline int64_t room(Fixed, int64_t m) { return ceil_div(m, kChunk) * (kHeader + kChunk); }
inline const Fixed* column(const Fixed* row, int64_t j) {  // j: the first of a chunk
    return row + j + j / kChunk * kHeader;
}
template <>
constexpr int rows_at_once<Fixed>(int k) {  // four sums a row and identity
    return k == 1 ? 4 : 6 / k;
}

struct InFixedPoint {
    using C = Fixed;
    using Sum = std::int32_t __attribute__((vector_size(64)));  // as __m512i GCC would copy it
    static constexpr int limbs = 4, header = kHeader;

    static Sum add(Sum sum, __m512i row, __m512i limb) {
        return reinterpret_cast<Sum>(
            _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), row, limb));
    }
    static float total(const Fixed* chunk, const Sum* sums) {
        int64_t too_much;
        std::memcpy(&too_much, chunk, sizeof too_much);
        const __m512i high = _mm512_slli_epi64(join(sums[2], sums[3]), 16);
        const __m512i all = _mm512_add_epi64(join(sums[0], sums[1]), high);
        return static_cast<float>(_mm512_reduce_add_epi64(all) - too_much);
    }

private:
    // A lane is 64 products of a chunk, of 255 * 128 at most, under 2^21: two limbs together are
    // i32 still, and then become eight i64.
    static __m512i join(Sum low, Sum high) {
        const auto x = reinterpret_cast<__m512i>(low + high * 256);
        return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(x)),
                                _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(x, 1)));
    }
};

// How V of T is multiplied: with c as C, `ways` columns a byte; integers are made unsigned by an
// offset.
template <class T>
struct Stored;

template <>
struct Stored<std::int8_t> : InFixedPoint {
    static constexpr int ways = 1, offset = 128;
    static __m512i factor(__m512i line, int) {
        return _mm512_xor_si512(line, _mm512_set1_epi8(-128));
    }
};
template <>
constexpr bool kStored<std::int8_t> = true;

template <>
struct Stored<u4> : InFixedPoint {
    static constexpr int ways = 2, offset = 8;
    static __m512i factor(__m512i line, int way) {
        return _mm512_and_si512(way ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
    }
};
template <>
constexpr bool kStored<u4> = true;

// The unit of a row of c; 0: it stays f32.
//
// The unit is 2^-30 of the power of two above the row's largest number, so that a number is off by
// at most 2^-30 of the largest. That is 2^-23 of a number which is at least 1/128 of it; where
// three quarters are (or zero), and V is not larger in the other columns, what those are off is
// less than that too: a sum is off by at most 2 * 2^-23 of the magnitudes it adds up. All that
// follows is exact until a chunk's sum is rounded to f32. Three limbs would not do: a coefficient
// by itself would be off by 2^-22.
template <class T>
inline float keep(T, const float* c, int64_t m, Fixed* out) {
    constexpr int W = Stored<T>::ways, G = kPerLine<T>;
    float largest = 0;
    for (int64_t j = 0; j < m; ++j) {
        const float x = __builtin_fabsf(c[j]);
        if (!(x < 0x1p60f)) return 0;  // a NaN, too
        if (x > largest) largest = x;
    }
    if (largest > 0 && largest < 0x1p-90f) return 0;
    int64_t small = 0;
    for (int64_t j = 0; j < m; ++j) small += c[j] != 0 && __builtin_fabsf(c[j]) < largest / 128;
    if (4 * small > m) return 0;
    int exponent;
    __builtin_frexpf(largest, &exponent);
    const float unit = __builtin_ldexpf(1, exponent - 30);
    std::memset(out, 0, static_cast<std::size_t>(room(Fixed{}, m)) * sizeof(Fixed));
    for (int64_t first = 0; first < m; first += kChunk, out += kHeader + kChunk) {
        auto* limbs = reinterpret_cast<std::int8_t*>(out + kHeader);
        int64_t too_much = 0;
        for (int64_t j = 0; j < least(m - first, kChunk); ++j) {
            const double x = double{c[first + j]} / unit;
            auto rest = static_cast<std::int32_t>(x + (x < 0 ? -0.5 : 0.5));
            too_much += int64_t{rest} * Stored<T>::offset;
            std::int8_t* at = limbs + (j / G * W + j % W) * 256 + j % G / W;
            for (int l = 0; l < 4; ++l) {
                at[l * 64] = static_cast<std::int8_t>(rest);
                rest = (rest - at[l * 64]) / 256;
            }
        }
        std::memcpy(out, &too_much, sizeof too_much);
    }
    return unit;
}
inline bool loses(Fixed, float) { return false; }

#if defined(__AVX512BF16__)

template <>
struct Stored<bf16> {
    using C = bf16;
    using Sum = __m512;
    static constexpr int limbs = 1, header = 0, ways = 1;

    static __m512i factor(__m512i line, int) { return line; }
    static Sum add(Sum sum, __m512i row, __m512i c) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(row),
                                reinterpret_cast<__m512bh>(c));
    }
    static float total(const bf16*, const Sum* sums) { return _mm512_reduce_add_ps(*sums); }
};
template <>
constexpr bool kStored<bf16> = true;

// For rows that are bf16 already: products are exact, and sums round as those of f32 do. Others
// would be split into three, of which each takes half the time of f32's multiply-adds.
//
// The instruction takes subnormal numbers for zeros, and makes them so. With c in these bounds
// that costs some 2^20 * 2^-126 a column, 2^-46 of the least sum that is not made again.
inline int64_t room(bf16, int64_t m) { return ceil_div(m, kPerLine<bf16>) * kPerLine<bf16>; }
inline float keep(bf16, const float* c, int64_t m, bf16* out) {
    for (int64_t j = 0; j < room(bf16{}, m); ++j) {
        const float x = j < m ? c[j] : 0, size = __builtin_fabsf(x);
        std::uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        if (bits & 0xffff || !(size == 0 || (size >= 0x1p-126f && size <= 0x1p20f))) return 0;
        out[j].bits = static_cast<std::uint16_t>(bits >> 16);
    }
    return 1;
}
inline bool loses(bf16, float sum) { return __builtin_fabsf(sum) < 0x1p-60f; }

#endif

// As dot.h's. Zeros fill c up to a whole line; behind a row of V nothing is read.
template <int R, int K, class T, class C>
inline void dot_block(const T* v, int64_t v_stride, const C* c, int64_t c_stride, int64_t n,
                      const T* ahead, Sums sums) {
    using S = Stored<T>;
    constexpr int L = S::limbs, kEach = 64 / sizeof(C);
    using Sum = typename S::Sum;
    Sum acc[R][K * L];
    for (int r = 0; r < R; ++r)
        for (int l = 0; l < K * L; ++l) acc[r][l] = Sum{};

    const auto line = [&](int64_t j, const auto& read) {
        for (int way = 0; way < S::ways; ++way) {
            __m512i row[R];
            for (int r = 0; r < R; ++r) row[r] = S::factor(read(column(v + r * v_stride, j)), way);
            for (int l = 0; l < K * L; ++l) {  // identity l / L
                const C* at = c + l / L * c_stride + S::header + j + (way * L + l % L) * kEach;
                const __m512i limb = _mm512_loadu_si512(at);
                for (int r = 0; r < R; ++r) acc[r][l] = S::add(acc[r][l], row[r], limb);
            }
        }
    };
    int64_t j = 0;
    for (; j + kPerLine<T> <= n; j += kPerLine<T>) {
        if (ahead)
            for (int r = 0; r < R; ++r) __builtin_prefetch(column(ahead + r * v_stride, j), 0, 2);
        line(j, [](const T* x) { return _mm512_loadu_si512(x); });
    }
    if (j < n) {
        const __mmask64 first = (1ull << ceil_div((n - j) * 64, kPerLine<T>)) - 1;
        line(j, [first](const T* x) { return _mm512_maskz_loadu_epi8(first, x); });
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < K; ++i) *sums.at(r, i) += S::total(c + i * c_stride, acc[r] + i * L);
}

template <class T>
struct Coefficients<T, true> {
    using C = typename Stored<T>::C;
    const int64_t k, m, pitch;
    const Coefficients<T, false> f32;
    const Floats kept, units;

    Coefficients(const float* c, int64_t stride, int64_t k, int64_t m)
        : k(k),
          m(m),
          pitch(room(C{}, m)),
          f32(c, stride, k, m),
          kept(ceil_div(k * pitch * sizeof(C), sizeof(float))),
          units(k) {
        for (int64_t i = 0; i < k; ++i) units[i] = keep(T{}, c + i * stride, m, row(i));
    }

    C* row(int64_t i) const { return reinterpret_cast<C*>(static_cast<float*>(kept)) + i * pitch; }

    // Neighbours of one form pass over V together.
    void multiply(const T* v, int64_t v_stride, int64_t rows, float* sums) const {
        for (int64_t i = 0, n = 1; i < k; i += n, n = 1) {
            while (i + n < k && (units[i] == 0) == (units[i + n] == 0)) ++n;
            if (units[i] == 0) {
                f32.multiply(v, v_stride, rows, i, n, sums + i * rows);
                continue;
            }
            dot(v, v_stride, rows, row(i), pitch, n, m, Sums{sums + i * rows, 1, rows});
            for (int64_t q = i; q < i + n; ++q)
                for (int64_t r = 0; r < rows; ++r) {
                    float* sum = sums + q * rows + r;
                    *sum *= units[q];
                    if (!loses(C{}, *sum)) continue;
                    *sum = 0;
                    f32.multiply(v + r * v_stride, v_stride, 1, q, 1, sum);
                }
        }
    }
};

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
