// Rows plus a low-rank product: merge's W + scale B A, low_rank's base + scale s up^T.
#pragma once

#include "vec.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// out[t, n] = base[t, n] + gain * sum_r coefficient[t, r] * factor[r, n]; base null: 0.
// coefficient and factor are f32, `rank` and factor_stride numbers a row.
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

template <int R, int C, class T, class Load, class Store>
inline void update_block(const Update<T>& u, int64_t t, int64_t n, const Load& read,
                         const Store& keep) {
    Vec acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = zero();
    const float* coefficient = u.coefficient + t * u.rank;
    for (int64_t i = 0; i < u.rank; ++i) {
        Vec factor[C];
        for (int c = 0; c < C; ++c) factor[c] = read(u.factor + i * u.factor_stride + n + c * kWidth);
        for (int r = 0; r < R; ++r) {
            const Vec x = splat(coefficient[r * u.rank + i]);
            for (int c = 0; c < C; ++c) acc[r][c] = fma(x, factor[c], acc[r][c]);
        }
    }
    const Vec gain = splat(u.gain);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            const int64_t at = n + c * kWidth;
            const Vec base = u.base ? read(u.base + (t + r) * u.base_stride + at) : zero();
            keep(u.out + (t + r) * u.out_stride + at, fma(gain, acc[r][c], base));
        }
}

// Rows [t, t + R) for n columns. Past: with stores past the caches, where rows are aligned.
template <int R, bool Past, class T>
inline void update_rows(const Update<T>& u, int64_t t, int64_t n) {
    const auto read = [](const auto* x) { return load(x); };
    const auto keep = [](T* out, Vec x) {
        if constexpr (Past)
            stream(out, x);
        else
            store(out, x);
    };
    int64_t j = 0;
    for (; j + 2 * kWidth <= n; j += 2 * kWidth) update_block<R, 2>(u, t, j, read, keep);
    for (; j + kWidth <= n; j += kWidth) update_block<R, 1>(u, t, j, read, keep);
    if (j < n) {
        const int rest = static_cast<int>(n - j);
        update_block<R, 1>(
            u, t, j, [rest](const auto* x) { return load_first(x, rest); },
            [rest](T* out, Vec x) { store_first(out, x, rest); });
    }
}

template <class T>
inline void update(const Update<T>& u, int64_t rows, int64_t n, bool past) {
    const std::uintptr_t together =
        reinterpret_cast<std::uintptr_t>(u.out) | static_cast<std::uintptr_t>(u.out_stride) * sizeof(T);
    past = past && together % (kWidth * sizeof(T)) == 0;
    int64_t t = 0;
    for (; t + 4 <= rows; t += 4) past ? update_rows<4, true>(u, t, n) : update_rows<4, false>(u, t, n);
    for (; t < rows; ++t) past ? update_rows<1, true>(u, t, n) : update_rows<1, false>(u, t, n);
    if (past) stream_end();
}

// n numbers at a distance from each other, widened.
template <class T>
inline void pack(const T* x, int64_t stride, int64_t n, float* out) {
    if (stride == 1) {
        by_vectors(n, [&](int64_t i, const auto& load, const auto& store) {
            store(out + i, load(x + i));
        });
        return;
    }
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(out + i, gather(x + i * stride, stride, kWidth));
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        store_first(out + i, gather(x + i * stride, stride, rest), rest);
    }
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
