// Scalar products of stored rows with f32 rows: reconstruct's c V^T, low_rank's x down^T.
#pragma once

#include "vec.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// Columns that are worked on at a time. 1024 columns of c are 4 KB an identity: four identities
// stay in L1 while a tile of rows passes. Short sums are also the accurate ones: at most
// 1024 / kWidth additions follow each other.
constexpr int64_t kChunk = 1024;
constexpr int kIdentities = 4;
// Rows that wait in L2 while the groups of identities pass: 96 KB of a chunk in bf16.
constexpr int64_t kDotTile = 48;

// Where the sum of row r and identity i is.
struct Sums {
    float* first;
    int64_t row, identity;  // strides

    float* at(int64_t r, int64_t i) const { return first + r * row + i * identity; }
};

// What to ask memory for meanwhile: rows as those being read, but elsewhere. Each of `turns`
// groups of identities that pass over the rows asks for its share of them.
template <class T>
struct Ahead {
    const T* rows;
    int64_t turn, turns;
};

// sums[r, i] += <V[r], c[i]> over n <= kChunk columns, for R rows and K identities held in
// registers; c is in the order of V's companions (vec.h). Each pair has its own accumulator and
// order of additions, whatever R and K are, so neither tails nor threads change a bit.
template <int R, int K, class T>
inline void dot_block(const T* v, int64_t v_stride, const float* c, int64_t c_stride, int64_t n,
                      const T* ahead, Sums sums) {
    Vec acc[R][K];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < K; ++i) acc[r][i] = zero();

    const auto step = [&](int64_t j, const auto& read_row, const float* ci, const auto& read) {
        Vec row[R];
        for (int r = 0; r < R; ++r) row[r] = read_row(column(v + r * v_stride, j));
        for (int i = 0; i < K; ++i) {
            const Vec coefficient = read(ci + i * c_stride);
            for (int r = 0; r < R; ++r) acc[r][i] = fma(row[r], coefficient, acc[r][i]);
        }
    };
    const auto group = [&](int64_t j) {
        each_way<T>([&](auto way) {
            step(
                j, [way](const T* x) { return load_way(x, way); }, c + j + way.value * kWidth,
                [](const float* x) { return load(x); });
        });
    };
    int64_t j = 0;
    for (; j + kPerLine<T> <= n; j += kPerLine<T>) {
        // A prefetch beyond the basis is not an access.
        if (ahead)
            for (int r = 0; r < R; ++r) __builtin_prefetch(column(ahead + r * v_stride, j), 0, 2);
        for (int u = 0; u < kPerLine<T>; u += kGroup<T>) group(j + u);
    }
    for (; j + kGroup<T> <= n; j += kGroup<T>) group(j);
    by_vectors(n - j, [&](int64_t at, const auto& load, const auto&) {
        step(j + at, load, c + j + at, load);
    });
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < K; ++i) *sums.at(r, i) += total(acc[r][i]);
}

// How many rows of V are read at once, by c's type and the number of identities. One identity
// leaves registers for more rows: enough chains to hide the latency of fma.
template <class C>
constexpr int rows_at_once(int k) {
    return k == 1 ? 4 : kDotRows;
}

// R rows that are read at once lie as far apart as `rows` allows: memory then sees R long
// sequential streams, which its prefetchers follow best.
template <int K, class T, class C>
inline void dot_rows(const T* v, int64_t v_stride, int64_t rows, const C* c, int64_t c_stride,
                     int64_t m, Ahead<T> ahead, Sums sums) {
    constexpr int R = rows_at_once<C>(K);
    const int64_t apart = rows / R;
    for (int64_t r = 0; r < apart; ++r) {
        const bool mine = ahead.rows && r % ahead.turns == ahead.turn;
        for (int64_t j = 0; j < m; j += kChunk)
            dot_block<R, K>(column(v + r * v_stride, j), apart * v_stride, column(c, j), c_stride,
                            least(m - j, kChunk), mine ? ahead.rows + r * v_stride : nullptr,
                            {sums.at(r, 0), apart * sums.row, sums.identity});
    }
    for (int64_t r = R * apart; r < rows; ++r)
        for (int64_t j = 0; j < m; j += kChunk)
            dot_block<1, K, T>(column(v + r * v_stride, j), v_stride, column(c, j), c_stride,
                               least(m - j, kChunk), nullptr,
                               {sums.at(r, 0), sums.row, sums.identity});
}

template <class T, class C>
inline void dot_groups(const T* v, int64_t v_stride, int64_t rows, const C* c, int64_t c_stride,
                       int64_t k, int64_t m, const T* next, Sums sums) {
    Ahead<T> ahead{next, 0, ceil_div(k, kIdentities)};
    for (int64_t i = 0; i < k; i += kIdentities, ++ahead.turn) {
        const C* ci = c + i * c_stride;
        const Sums si{sums.at(0, i), sums.row, sums.identity};
        switch (k - i) {
            case 1: dot_rows<1>(v, v_stride, rows, ci, c_stride, m, ahead, si); break;
            case 2: dot_rows<2>(v, v_stride, rows, ci, c_stride, m, ahead, si); break;
            case 3: dot_rows<3>(v, v_stride, rows, ci, c_stride, m, ahead, si); break;
            default: dot_rows<4>(v, v_stride, rows, ci, c_stride, m, ahead, si);
        }
    }
}

// sums[r, i] += <V[r], c[i]> for all rows and k identities. One group of identities reads rows
// from end to end, as there is nothing to come back for; several pass over a chunk of columns,
// kDotTile rows of it at a time, while memory fetches what comes next.
template <class T, class C>
inline void dot(const T* v, int64_t v_stride, int64_t rows, const C* c, int64_t c_stride, int64_t k,
                int64_t m, Sums sums) {
    if (k <= kIdentities) {
        dot_groups<T>(v, v_stride, rows, c, c_stride, k, m, nullptr, sums);
        return;
    }
    for (int64_t r = 0; r < rows; r += kDotTile)
        for (int64_t j = 0; j < m; j += kChunk) {
            const T* here = column(v + r * v_stride, j);
            const T* next = j + kChunk < m ? column(here, kChunk) : v + (r + kDotTile) * v_stride;
            dot_groups(here, v_stride, least(rows - r, kDotTile), column(c, j), c_stride, k,
                       least(m - j, kChunk), next, {sums.at(r, 0), sums.row, sums.identity});
        }
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
