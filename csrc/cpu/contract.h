// Sums of stored rows times f32 factors: project's z V, outer's coefficient^T feature.
//
// Rows are read as four streams, each a quarter of them, one row of each at a time: memory's
// prefetchers follow long streams far apart better than neighbouring rows. Twelve steps make a
// tile, whose sum is made apart and then joins the others: short sums are the accurate ones.
// This order follows from the number of rows alone. Few identities keep a tile's sums in memory
// and read rows from end to end; many keep them in registers, a few columns at a time, while the
// tile waits in L2. The bits are the same.
#pragma once

#include "vec.h"

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int kStreams = 4;
constexpr int64_t kSteps = 12;       // of a tile
constexpr int kAtOnce = 6;           // identities whose sums fit the registers
constexpr int64_t kApart = 1 << 14;  // numbers of scratch for the sums of few identities

// The factor of row r of stream s for identity i: first[s * stream + r * row + i].
struct Factors {
    const float* first;
    int64_t stream, row;
};

// A tile: rows [0, steps) of each stream.
template <class T>
struct Tile {
    const T* v;
    int64_t stride, apart;  // between the rows of a stream, and between streams
    int64_t steps;
    Factors factors;

    const T* row(int64_t step, int stream, int64_t j) const {
        return column(v + step * stride + stream * apart, j);
    }
    const float* factor(int64_t step, int stream) const {
        return factors.first + step * factors.row + stream * factors.stream;
    }
};

template <int K, int S, class T>
inline void sum_in_memory(const Tile<T>& given, int64_t n, float* scratch, float* sums,
                          int64_t sums_stride) {
    constexpr int64_t columns = kApart / K / kGroup<T> * kGroup<T>;
    const Tile<T> tile = given;  // a copy, whose fields the compiler knows no store to change
    for (int64_t first = 0; first < n; first += columns) {
        const int64_t count = least(n - first, columns), whole = count / kGroup<T> * kGroup<T>;
        for (int i = 0; i < K; ++i)
            std::memset(scratch + i * columns, 0, static_cast<std::size_t>(count) * sizeof(float));
        for (int64_t step = 0; step < tile.steps; ++step) {
            Vec factor[K][S];
            for (int i = 0; i < K; ++i)
                for (int s = 0; s < S; ++s) factor[i][s] = splat(tile.factor(step, s)[i]);
            // One row of each stream joins the sums of kWidth columns, j of the row, at of sums.
            const auto add = [&](int64_t j, int64_t at, const auto& read_row, const auto& read,
                                 const auto& keep) {
                Vec row[S];
                for (int s = 0; s < S; ++s) row[s] = read_row(tile.row(step, s, first + j));
                for (int i = 0; i < K; ++i) {
                    Vec sum = read(scratch + i * columns + at);
                    for (int s = 0; s < S; ++s) sum = fma(row[s], factor[i][s], sum);
                    keep(scratch + i * columns + at, sum);
                }
            };
            for (int64_t j = 0; j < whole; j += kGroup<T>)
                each_way<T>([&](auto way) {
                    add(
                        j, j + way.value * kWidth, [way](const T* x) { return load_way(x, way); },
                        [](const float* x) { return load(x); },
                        [](float* out, Vec x) { store(out, x); });
                });
            by_vectors(count - whole, [&](int64_t j, const auto& load, const auto& store) {
                add(whole + j, whole + j, load, load, store);
            });
        }
        for (int i = 0; i < K; ++i)
            by_vectors(count, [&](int64_t j, const auto& load, const auto& store) {
                float* sum = sums + i * sums_stride + first + j;
                store(sum, load(sum) + load(scratch + i * columns + j));
            });
    }
}

// read_row(x, c): column vector c of C at x.
template <int K, int S, int C, class T, class ReadRow, class Load, class Store>
inline void sum_block(const Tile<T>& tile, int64_t i0, int64_t j, bool ahead, float* sums,
                      int64_t sums_stride, const ReadRow& read_row, const Load& read,
                      const Store& keep) {
    Vec acc[K][C];
    for (int i = 0; i < K; ++i)
        for (int c = 0; c < C; ++c) acc[i][c] = zero();
    for (int64_t step = 0; step < tile.steps; ++step)
        for (int s = 0; s < S; ++s) {
            Vec row[C];
            read_row(tile.row(step, s, j), row);
            // What the next tile reads; beyond the last one a prefetch is not an access.
            if (ahead) __builtin_prefetch(tile.row(step + kSteps, s, j), 0, 2);
            const float* factors = tile.factor(step, s) + i0;
            for (int i = 0; i < K; ++i) {
                const Vec factor = splat(factors[i]);
                for (int c = 0; c < C; ++c) acc[i][c] = fma(row[c], factor, acc[i][c]);
            }
        }
    for (int i = 0; i < K; ++i)
        for (int c = 0; c < C; ++c) {
            float* sum = sums + i * sums_stride + j + c * kWidth;
            keep(sum, read(sum) + acc[i][c]);
        }
}

template <int K, int S, class T>
inline void sum_in_registers(const Tile<T>& tile, int64_t i0, int64_t n, bool ahead, float* sums,
                             int64_t sums_stride) {
    constexpr int C = kSumColumns;
    const auto read = [](const auto* x) { return load(x); };
    const auto keep = [](float* out, Vec x) { store(out, x); };
    int64_t j = 0;
    for (; j + C * kWidth <= n; j += C * kWidth)
        sum_block<K, S, C>(
            tile, i0, j, ahead, sums, sums_stride,
            [](const T* x, Vec(&row)[C]) {
                for (int g = 0; g < C / kWays<T>; ++g)
                    each_way<T>([&](auto way) {
                        row[g * kWays<T> + way.value] = load_way(column(x, g * kGroup<T>), way);
                    });
            },
            read, keep);
    for (; j + kGroup<T> <= n; j += kGroup<T>)
        sum_block<K, S, kWays<T>>(
            tile, i0, j, false, sums, sums_stride,
            [](const T* x, Vec(&row)[kWays<T>]) {
                each_way<T>([&](auto way) { row[way.value] = load_way(x, way); });
            },
            read, keep);
    by_vectors(n - j, [&](int64_t at, const auto& load, const auto& store) {
        sum_block<K, S, 1>(
            tile, i0, j + at, false, sums, sums_stride,
            [&load](const T* x, Vec(&row)[1]) { row[0] = load(x); }, load, store);
    });
}

template <int S, class T>
inline void sum_tile(const Tile<T>& tile, int64_t k, int64_t n, float* scratch, float* sums,
                     int64_t sums_stride) {
    switch (k) {
        case 1: return sum_in_memory<1, S>(tile, n, scratch, sums, sums_stride);
        case 2: return sum_in_memory<2, S>(tile, n, scratch, sums, sums_stride);
        case 3: return sum_in_memory<3, S>(tile, n, scratch, sums, sums_stride);
        case 4: return sum_in_memory<4, S>(tile, n, scratch, sums, sums_stride);
        default: break;
    }
    for (int64_t i = 0; i < k; i += kAtOnce) {
        const bool ahead = i == 0;
        float* si = sums + i * sums_stride;
        switch (k - i) {
            case 1: sum_in_registers<1, S>(tile, i, n, ahead, si, sums_stride); break;
            case 2: sum_in_registers<2, S>(tile, i, n, ahead, si, sums_stride); break;
            case 3: sum_in_registers<3, S>(tile, i, n, ahead, si, sums_stride); break;
            case 4: sum_in_registers<4, S>(tile, i, n, ahead, si, sums_stride); break;
            case 5: sum_in_registers<5, S>(tile, i, n, ahead, si, sums_stride); break;
            default: sum_in_registers<kAtOnce, S>(tile, i, n, ahead, si, sums_stride);
        }
    }
}

// sums[i, n] += sum over all rows of factor * V[r, n], for k identities and n columns; sums are in
// the order of V's companions.
// factors(first, apart, steps): those of rows first + s * apart + [0, steps) of each stream s.
// scratch: kApart numbers.
template <class T, class GetFactors>
inline void contract(const T* v, int64_t stride, int64_t rows, int64_t k, int64_t n,
                     const GetFactors& factors, float* scratch, float* sums, int64_t sums_stride) {
    const int64_t apart = rows / kStreams, rest = kStreams * apart;
    for (int64_t r = 0; r < apart; r += kSteps) {
        const int64_t steps = least(apart - r, kSteps);
        const Tile<T> tile{v + r * stride, stride, apart * stride, steps,
                           factors(r, apart, steps)};
        sum_tile<kStreams>(tile, k, n, scratch, sums, sums_stride);
    }
    if (rest < rows) {
        const Tile<T> tile{v + rest * stride, stride, 0, rows - rest,
                           factors(rest, int64_t{0}, rows - rest)};
        sum_tile<1>(tile, k, n, scratch, sums, sums_stride);
    }
}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
