// Vectors of f32: all that the kernels know of an instruction set.
//
// kWidth numbers a Vec. load and store widen and round the stored types; load_first and
// store_first touch n numbers and no memory behind them, n < kWidth, and read zeros for the rest
// (minus eights of u4). stream stores past the caches, to an address aligned to what it stores.
// Rounding is to nearest even, and a NaN stays one.
//
// No standard-library template may be used here: the linker keeps one copy of an inline
// function, and the copy made with AVX-512 flags must not reach an older machine.
#pragma once

#include <cstring>

#include "numbers.h"

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace w2w::cpu::W2W_ISA {
namespace {

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

// n numbers at a distance from each other, n <= kWidth.
template <class T>
inline Vec gather(const T* x, int64_t stride, int n) {
    T numbers[kWidth] = {};
    for (int i = 0; i < n; ++i) numbers[i] = x[i * stride];
    return load(numbers);
}
template <class T>
inline void scatter(T* out, int64_t stride, Vec x, int n) {
    T numbers[kWidth];
    store(numbers, x);
    for (int i = 0; i < n; ++i) out[i * stride] = numbers[i];
}

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

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
