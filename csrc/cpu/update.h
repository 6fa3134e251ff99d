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

// The R rows that are worked on at once lie as far apart as there are rows: see dot.h.
struct Rows {
    int64_t first, apart;

    int64_t operator[](int r) const { return first + r * apart; }
};

// sums[r][c] of row rows[r] and column vector c. Rank: known to the compiler, or 0.
template <int Rank, int R, int C, class T, class Load>
[[gnu::always_inline]] inline void products(const Update<T>& u, Rows rows, int64_t n,
                                            const Load& read, Vec (&sums)[R][C]) {
    const int64_t rank = Rank ? Rank : u.rank;
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = zero();
    for (int64_t i = 0; i < rank; ++i) {
        const float* factor = u.factor + i * u.factor_stride + n;
        Vec x[C];
        for (int c = 0; c < C; ++c) x[c] = read(factor + c * kWidth);
        for (int r = 0; r < R; ++r) {
            const Vec by = splat(u.coefficient[rows[r] * rank + i]);
            for (int c = 0; c < C; ++c) sums[r][c] = fma(by, x[c], sums[r][c]);
        }
    }
}

// G whole groups of columns of R rows. Past: with stores past the caches, to aligned rows.
template <int Rank, int R, int G, bool Past, class T>
[[gnu::always_inline]] inline void update_groups(const Update<T>& u, Rows rows, int64_t n) {
    constexpr int W = kWays<T>;
    const Vec gain = splat(u.gain);
    Vec sums[R][G * W];
    products<Rank>(u, rows, n, [](const float* x) { return load(x); }, sums);
    for (int r = 0; r < R; ++r)
        for (int g = 0; g < G; ++g) {
            const int64_t at = n + g * kGroup<T>;
            const T* base = u.base ? u.base + rows[r] * u.base_stride + at : nullptr;
            T* out = u.out + rows[r] * u.out_stride + at;
            Vec all[W];
            each_way<T>([&](auto way) {
                const Vec from = base ? load_way(base, way) : zero();
                all[way.value] = fma(gain, sums[r][g * W + way.value], from);
            });
            if constexpr (Past)
                stream_ways(out, all);
            else
                store_ways(out, all);
        }
}

template <int Rank, int R, bool Past, class T>
[[gnu::always_inline]] inline void update_rows(const Update<T>& u, Rows rows, int64_t n) {
    constexpr int G = 4 / kWays<T>;
    int64_t j = 0;
    for (; j + G * kGroup<T> <= n; j += G * kGroup<T>) update_groups<Rank, R, G, Past>(u, rows, j);
    for (; j + kGroup<T> <= n; j += kGroup<T>) update_groups<Rank, R, 1, Past>(u, rows, j);
    by_vectors(n - j, [&](int64_t at, const auto& load, const auto& store) {
        Vec sums[R][1];
        products<Rank>(u, rows, j + at, load, sums);
        for (int r = 0; r < R; ++r) {
            const T* base = u.base ? u.base + rows[r] * u.base_stride + j + at : nullptr;
            store(u.out + rows[r] * u.out_stride + j + at,
                  fma(splat(u.gain), sums[r][0], base ? load(base) : zero()));
        }
    });
}

template <int Rank, bool Past, class T>
inline void update_all(const Update<T>& given, int64_t rows, int64_t n) {
    // A copy, whose fields the compiler knows no store to change. Products of one term need no
    // rows to share them; 3 rows x 4 columns of sums fit sixteen registers.
    const Update<T> u = given;
    constexpr int R = Rank == 1 ? 1 : 3;
    const int64_t apart = rows / R;
    for (int64_t t = 0; t < apart; ++t) update_rows<Rank, R, Past>(u, Rows{t, apart}, n);
    for (int64_t t = R * apart; t < rows; ++t) update_rows<Rank, 1, Past>(u, Rows{t, 0}, n);
}

template <class T>
inline void update(const Update<T>& u, int64_t rows, int64_t n, bool past) {
    const std::uintptr_t places = reinterpret_cast<std::uintptr_t>(u.out) |
                                  static_cast<std::uintptr_t>(u.out_stride) * sizeof(T);
    if (past && places % (kGroup<T> * sizeof(T)) == 0) {
        u.rank == 1 ? update_all<1, true>(u, rows, n) : update_all<0, true>(u, rows, n);
        stream_end();
    } else {
        u.rank == 1 ? update_all<1, false>(u, rows, n) : update_all<0, false>(u, rows, n);
    }
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
