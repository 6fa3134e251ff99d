// Rows plus a low-rank product: merge's W + scale B A, low_rank's base + scale s up^T.
#pragma once

#include "vec.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// out[t, n] = base[t, n] + gain * sum_r coefficient[t, r] * factor[r, n]; base null: 0.
// coefficient and factor are f32, `rank` and factor_stride numbers a row, factor in the order of
// T's companions.
template <class T>
struct Update {
    T* out;
    int64_t out_stride;
    const T* base;
    int64_t base_stride;
    const float* coefficient;
    const float* factor;
    int64_t factor_stride, rank;
    float gain;
};

// Row t + r of the R rows from t, column vector c of C: sums[r][c].
template <int R, int C, class T, class Load>
inline void products(const Update<T>& u, int64_t t, int64_t n, const Load& read,
                     Vec (&sums)[R][C]) {
    const float* coefficient = u.coefficient + t * u.rank;
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = zero();
    for (int64_t i = 0; i < u.rank; ++i) {
        const float* factor = u.factor + i * u.factor_stride + n;
        Vec x[C];
        for (int c = 0; c < C; ++c) x[c] = read(factor + c * kWidth);
        for (int r = 0; r < R; ++r) {
            const Vec by = splat(coefficient[r * u.rank + i]);
            for (int c = 0; c < C; ++c) sums[r][c] = fma(by, x[c], sums[r][c]);
        }
    }
}

// Rows [t, t + R) for n columns. Past: with stores past the caches, where rows are aligned.
template <int R, bool Past, class T>
inline void update_rows(const Update<T>& u, int64_t t, int64_t n) {
    constexpr int W = kWays<T>, C = 4, G = C / W;  // G groups at once: a cache line of 16 bits
    const Vec gain = splat(u.gain);
    const auto read = [](const float* x) { return load(x); };
    const auto groups = [&](int64_t j, auto& sums, int count) {
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < count; ++g) {
                const int64_t at = j + g * kGroup<T>;
                const T* base = u.base + (t + r) * u.base_stride + at;
                T* out = u.out + (t + r) * u.out_stride + at;
                Vec all[W];
                each_way<T>([&](auto way) {
                    const Vec from = u.base ? load_way(base, way) : zero();
                    all[way.value] = fma(gain, sums[r][g * W + way.value], from);
                });
                if constexpr (Past)
                    stream_ways(out, all);
                else
                    store_ways(out, all);
            }
    };
    int64_t j = 0;
    for (; j + G * kGroup<T> <= n; j += G * kGroup<T>) {
        Vec sums[R][C];
        products<R, C>(u, t, j, read, sums);
        groups(j, sums, G);
    }
    for (; j + kGroup<T> <= n; j += kGroup<T>) {
        Vec sums[R][W];
        products<R, W>(u, t, j, read, sums);
        groups(j, sums, 1);
    }
    by_vectors(n - j, [&](int64_t at, const auto& load, const auto& store) {
        Vec sums[R][1];
        products<R, 1>(u, t, j + at, load, sums);
        for (int r = 0; r < R; ++r) {
            const T* base = u.base + (t + r) * u.base_stride + j + at;
            store(u.out + (t + r) * u.out_stride + j + at,
                  fma(gain, sums[r][0], u.base ? load(base) : zero()));
        }
    });
}

template <bool Past, class T>
inline void update_all(const Update<T>& u, int64_t rows, int64_t n) {
    int64_t t = 0;
    for (; t + 2 <= rows; t += 2) update_rows<2, Past>(u, t, n);
    if (t < rows) update_rows<1, Past>(u, t, n);
}

template <class T>
inline void update(const Update<T>& u, int64_t rows, int64_t n, bool past) {
    const std::uintptr_t places = reinterpret_cast<std::uintptr_t>(u.out) |
                                  static_cast<std::uintptr_t>(u.out_stride) * sizeof(T);
    if (past && places % (kGroup<T> * sizeof(T)) == 0) {
        update_all<true>(u, rows, n);
        stream_end();
    } else {
        update_all<false>(u, rows, n);
    }
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
