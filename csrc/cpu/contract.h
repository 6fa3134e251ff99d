// Sums of stored rows times f32 factors: project's z V, outer's coefficient^T feature.
#pragma once

#include "vec.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// Rows that are summed in registers before they join the sums in memory: short sums are the
// accurate ones, and every sum is made alike whatever else is asked for.
constexpr int64_t kGroup = 24;

// The factor of row r for identity i is first[r * row + i * identity].
struct Factors {
    const float* first;
    int64_t row, identity;  // strides
};

// sums[i, n] += sum over rows <= kGroup of factors[r, i] * V[r, n], for K identities and C
// vectors of columns held in registers.
template <int K, int C, class T, class Load, class Keep>
inline void sum_block(const T* v, int64_t stride, int64_t rows, Factors f, const T* ahead,
                      float* sums, int64_t sums_stride, const Load& read, const Keep& keep) {
    Vec acc[K][C];
    for (int i = 0; i < K; ++i)
        for (int c = 0; c < C; ++c) acc[i][c] = zero();
    for (int64_t r = 0; r < rows; ++r) {
        Vec row[C];
        for (int c = 0; c < C; ++c) row[c] = read(column(v + r * stride, c * kWidth));
        if (ahead)
            for (int c = 0; c < C * kWidth; c += kPerLine<T>)
                __builtin_prefetch(column(ahead + r * stride, c), 0, 2);
        for (int i = 0; i < K; ++i) {
            const Vec factor = splat(f.first[r * f.row + i * f.identity]);
            for (int c = 0; c < C; ++c) acc[i][c] = fma(row[c], factor, acc[i][c]);
        }
    }
    for (int i = 0; i < K; ++i)
        for (int c = 0; c < C; ++c) {
            float* sum = sums + i * sums_stride + c * kWidth;
            keep(sum, acc[i][c] + read(sum));
        }
}

template <int K, class T>
inline void sum_rows(const T* v, int64_t stride, int64_t rows, Factors f, int64_t n,
                     const T* ahead, float* sums, int64_t sums_stride) {
    constexpr int C = K == 1 ? 8 : kSumColumns / K;
    const auto read = [](const auto* x) { return load(x); };
    const auto keep = [](float* out, Vec x) { store(out, x); };
    int64_t j = 0;
    for (; j + C * kWidth <= n; j += C * kWidth)
        sum_block<K, C>(column(v, j), stride, rows, f, ahead ? column(ahead, j) : ahead, sums + j,
                        sums_stride, read, keep);
    for (; j + kWidth <= n; j += kWidth)
        sum_block<K, 1, T>(column(v, j), stride, rows, f, nullptr, sums + j, sums_stride, read,
                           keep);
    if (j < n) {
        const int rest = static_cast<int>(n - j);
        sum_block<K, 1, T>(
            column(v, j), stride, rows, f, nullptr, sums + j, sums_stride,
            [rest](const auto* x) { return load_first(x, rest); },
            [rest](float* out, Vec x) { store_first(out, x, rest); });
    }
}

// sums[i, n] += sum over all rows of factors[r, i] * V[r, n], for k identities and n columns.
// next: rows to ask memory for meanwhile, or null.
template <class T>
inline void contract(const T* v, int64_t stride, int64_t rows, Factors f, int64_t k, int64_t n,
                     const T* next, float* sums, int64_t sums_stride) {
    constexpr int64_t kIdentities = 4;
    const int64_t turns = ceil_div(k, kIdentities);
    int64_t step = 0;
    for (int64_t i = 0; i < k; i += kIdentities)
        for (int64_t r = 0; r < rows; r += kGroup, ++step) {
            const Factors fi{f.first + r * f.row + i * f.identity, f.row, f.identity};
            const T *vr = v + r * stride;
            const T *ahead = next && step % turns == 0 ? next + r * stride : nullptr;
            const int64_t count = least(rows - r, kGroup);
            float* si = sums + i * sums_stride;
            switch (k - i) {
                case 1: sum_rows<1>(vr, stride, count, fi, n, ahead, si, sums_stride); break;
                case 2: sum_rows<2>(vr, stride, count, fi, n, ahead, si, sums_stride); break;
                case 3: sum_rows<3>(vr, stride, count, fi, n, ahead, si, sums_stride); break;
                default: sum_rows<4>(vr, stride, count, fi, n, ahead, si, sums_stride);
            }
        }
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
