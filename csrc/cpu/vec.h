// Vectors of f32: all that the kernels know of an instruction set.
//
// kWidth numbers a Vec. load and store widen and round the stored types; load_first and
// store_first touch n numbers and no memory behind them, n < kWidth, and read zeros for the rest
// (minus eights of u4). Rounding is to nearest even; a NaN stays one if it comes from arithmetic,
// as what is stored does.
//
// 16-bit numbers are cheapest to widen by twos: a register of bf16 shifted left has the even
// columns, masked it has the odd ones. So a group of kGroup<T> columns is read as kWays<T> Vecs,
// each kWays<T> columns apart, and f32 companions of T (coefficients, sums) are kept in that
// order: a group's first way, then its second. Columns after the last whole group keep theirs.
// stream_ways stores past the caches, to an address aligned to a group.
//
// No standard-library template may be used here: the linker keeps one copy of an inline
// function, and the copy made with AVX-512 flags must not reach an older machine.
#pragma once

#include <cstring>

#include "numbers.h"

namespace w2w::cpu::W2W_ISA {
namespace {

template <int W>
struct Way {
    static constexpr int value = W;
};
template <class T>
constexpr int kWays = 1;
template <>
constexpr int kWays<bf16> = 2;

}  // namespace
}  // namespace w2w::cpu::W2W_ISA

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace w2w::cpu::W2W_ISA {
namespace {

template <class T>
constexpr int kGroup = kWays<T> * kWidth;

template <class T>
inline Vec load_way(const T* x, Way<0>) {
    return load(x);
}
template <class T>
inline void store_ways(T* out, const Vec (&x)[1]) {
    store(out, x[0]);
}

template <class T, class F>
inline void each_way(const F& f) {
    f(Way<0>{});
    if constexpr (kWays<T> == 2) f(Way<1>{});
}

#if !defined(__AVX512F__)
template <class T>
inline Vec load_first(const T* x, int n) {
    T padded[kWidth] = {};
    std::memcpy(padded, x, static_cast<std::size_t>(n) * sizeof(T));
    return load(padded);
}
inline Vec load_first(const u4* x, int n) {
    u4 padded[kWidth / 2] = {};
    std::memcpy(padded, x, static_cast<std::size_t>(n + 1) / 2);
    return load(padded);
}
template <class T>
inline void store_first(T* out, Vec x, int n) {
    T all[kWidth];
    store(all, x);
    std::memcpy(out, all, static_cast<std::size_t>(n) * sizeof(T));
}
#endif

// step(j, load, store) for every kWidth columns of n, the last of them fewer.
template <class Step>
inline void by_vectors(int64_t n, const Step& step) {
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth)
        step(j, [](const auto* x) { return load(x); }, [](auto* out, Vec x) { store(out, x); });
    if (j < n) {
        const int rest = static_cast<int>(n - j);
        step(j, [rest](const auto* x) { return load_first(x, rest); },
             [rest](auto* out, Vec x) { store_first(out, x, rest); });
    }
}

// n numbers at a distance from each other, widened, in the order of T's companions.
template <class T, class From>
inline void pack(const From* x, int64_t stride, int64_t n, float* out) {
    constexpr int G = kGroup<T>, W = kWays<T>;
    for (int64_t j = 0; j < n; j += G) {
        const int count = static_cast<int>(least(n - j, G));
        From numbers[G] = {};
        for (int i = 0; i < count; ++i) numbers[i] = x[(j + i) * stride];
        float wide[G];
        for (int w = 0; w < W; ++w) store(wide + w * kWidth, load(numbers + w * kWidth));
        for (int i = 0; i < count; ++i)
            out[j + i] = wide[count < G ? i : i % kWidth * W + i / kWidth];
    }
}

// n companions of T back in the order of their columns.
template <class T>
inline void unpack(const float* x, int64_t n, float* out) {
    constexpr int G = kGroup<T>, W = kWays<T>;
    for (int64_t j = 0; j < n; j += G)
        for (int i = 0; i < G && i < n - j; ++i)
            out[j + i] = x[j + (n - j < G ? i : i % W * kWidth + i / W)];
}

template <class T>
inline void scatter(T* out, int64_t stride, Vec x, int n) {
    T numbers[kWidth];
    store(numbers, x);
    for (int i = 0; i < n; ++i) out[i * stride] = numbers[i];
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
