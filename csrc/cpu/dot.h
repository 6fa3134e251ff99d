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
constexpr int kPrefetch = 2;  // into L2

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
// registers. Each pair has its own accumulator and order of additions, whatever R and K are, so
// neither tails nor threads change a bit of the result.
template <int R, int K, class T>
inline void dot_block(const T* v, int64_t v_stride, const float* c, int64_t c_stride, int64_t n,
                      const T* ahead, Sums sums) {
    Vec acc[R][K];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < K; ++i) acc[r][i] = zero();

    const auto step = [&](auto read, int64_t j) {
        Vec row[R];
        for (int r = 0; r < R; ++r) row[r] = read(column(v + r * v_stride, j));
        for (int i = 0; i < K; ++i) {
            const Vec coefficient = read(c + i * c_stride + j);
            for (int r = 0; r < R; ++r) acc[r][i] = fma(row[r], coefficient, acc[r][i]);
        }
    };
    int64_t j = 0;
    for (; j + kPerLine<T> <= n; j += kPerLine<T>) {
        // A prefetch beyond the basis is not an access.
        if (ahead)
            for (int r = 0; r < R; ++r)
                __builtin_prefetch(column(ahead + r * v_stride, j), 0, kPrefetch);
        for (int u = 0; u < kPerLine<T>; u += kWidth) step([](auto* x) { return load(x); }, j + u);
    }
    for (; j + kWidth <= n; j += kWidth) step([](auto* x) { return load(x); }, j);
    if (j < n) {
        const int rest = static_cast<int>(n - j);
        step([rest](auto* x) { return load_first(x, rest); }, j);
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < K; ++i) *sums.at(r, i) += total(acc[r][i]);
}

template <int K, class T>
inline void dot_rows(const T* v, int64_t v_stride, int64_t rows, const float* c, int64_t c_stride,
                     int64_t n, Ahead<T> ahead, Sums sums) {
    // One identity leaves registers for more rows: enough chains to hide the latency of fma.
    constexpr int R = K == 1 ? 4 : kDotRows;
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
        const bool mine = ahead.rows && r / R % ahead.turns == ahead.turn;
        dot_block<R, K>(v + r * v_stride, v_stride, c, c_stride, n,
                        mine ? ahead.rows + r * v_stride : nullptr,
                        {sums.at(r, 0), sums.row, sums.identity});
    }
    for (; r < rows; ++r)
        dot_block<1, K, T>(v + r * v_stride, v_stride, c, c_stride, n, nullptr,
                           {sums.at(r, 0), sums.row, sums.identity});
}

// sums[r, i] += <V[r], c[i]> over n <= kChunk columns, for all rows and k identities.
template <class T>
inline void dot(const T* v, int64_t v_stride, int64_t rows, const float* c, int64_t c_stride,
                int64_t k, int64_t n, const T* next, Sums sums) {
    Ahead<T> ahead{next, 0, ceil_div(k, kIdentities)};
    for (int64_t i = 0; i < k; i += kIdentities, ++ahead.turn) {
        const float* ci = c + i * c_stride;
        const Sums si{sums.at(0, i), sums.row, sums.identity};
        switch (k - i) {
            case 1: dot_rows<1>(v, v_stride, rows, ci, c_stride, n, ahead, si); break;
            case 2: dot_rows<2>(v, v_stride, rows, ci, c_stride, n, ahead, si); break;
            case 3: dot_rows<3>(v, v_stride, rows, ci, c_stride, n, ahead, si); break;
            default: dot_rows<4>(v, v_stride, rows, ci, c_stride, n, ahead, si);
        }
    }
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
