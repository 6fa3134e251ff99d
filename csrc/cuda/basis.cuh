// What reconstruct and project share: a stored basis on its way to the tensor cores.
//
// A warp copies pieces of rows to its own part of shared memory in the background (fill), reads
// them back 16 bytes a lane, and makes pairs of bf16 of them (decode): numbers of 8 and 4 bits
// are exact in bf16. The f32 numbers they are multiplied with are the exact sum of three bf16
// (split), so that products are exact and only their sum, in f32, rounds.
//
// A sum may go through its terms in any order if both factors do: lanes take what lies together
// in memory, and the fragments of mma need no shuffling.
#pragma once

#include <cmath>

#include "../basis.h"
#include "numbers.cuh"

namespace w2w::cuda {

constexpr int kRowBytes = 128;  // of a row in one step: a line of the cache
constexpr int kStepChunks = kRowBytes / 16;

// Columns in 8 bits of memory times 2: bf16 1, i8 2, u4 4. Also: groups of 8 columns in 16 bytes.
template <Dtype T>
inline constexpr int kGroups = T == Dtype::bf16 ? 1
                               : T == Dtype::i8 ? 2
                                                : 4;

template <Dtype T>
inline constexpr int kStepColumns = kGroups<T> * kRowBytes / 2;

// Which of 8 columns is in half `half` of word `i` of a decoded group.
template <Dtype T>
__device__ constexpr int column(int i, int half) {
    if (T == Dtype::i8) return i / 2 * 4 + i % 2 + 2 * half;
    if (T == Dtype::u4) return i + 4 * half;
    return 2 * i + half;
}

// The basis in bytes.
struct Stored {
    const unsigned char* rows;
    i64 d, stride, row_bytes;
    int width;  // of a copy: 16, 8 or 4 bytes where all rows begin at multiples of it, else 1
};

inline Stored stored(const Basis& basis) {
    const int size = basis.dtype == Dtype::f32 ? 4 : basis.dtype == Dtype::bf16 ? 2 : 1;
    const i64 stride = basis.d > 1 ? basis.stride * size : 0;
    const i64 row = basis.dtype == Dtype::u4 ? ceil_div(basis.m, 2) : basis.m * size;
    int width = 1;
    for (const int bytes : {4, 8, 16})
        if (aligned(basis.rows, bytes) && stride % bytes == 0) width = bytes;
    return {static_cast<const unsigned char*>(basis.rows), basis.d, stride, row, width};
}

// Where chunk `chunk` of a row lies in a warp's part of shared memory: moved within its 128 bytes
// so that the eight lanes that read together meet different banks.
enum class Readers { rows_of_a_tile, columns_of_a_tile };

template <Readers READERS>
__device__ __forceinline__ int place(int row, int chunk) {
    return chunk ^ (READERS == Readers::rows_of_a_tile ? row % 2 * 4 : row / 8 % 4 * 2);
}

// Starts the copy of bytes at.. of rows first.. to `slot` [ROWS][CHUNKS] of 16 bytes; zeros
// outside of the basis. To be followed by copies_commit, copies_wait and __syncwarp.
template <Readers READERS, int ROWS, int CHUNKS>
__device__ __forceinline__ void fill(const Stored& basis, uint4* slot, i64 first, i64 at,
                                     int lane) {
    const auto copy = [&](int i, auto each) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const i64 begin = at + chunk * 16;
        int inside = static_cast<int>(most(0, least(16, basis.row_bytes - begin)));
        if (first + row >= basis.d) inside = 0;
        const unsigned char* from = basis.rows;
        if (inside) from += (first + row) * basis.stride + begin;
        each(reinterpret_cast<unsigned char*>(slot + row * CHUNKS + place<READERS>(row, chunk)),
             from, inside);
    };
    if (basis.width == 16) {
#pragma unroll 4
        for (int i = lane; i < ROWS * CHUNKS; i += 32)
            copy(i, [](unsigned char* to, const unsigned char* from, int inside) {
                copy_async<16>(to, from, inside);
            });
        return;
    }
#pragma unroll 1
    for (int i = lane; i < ROWS * CHUNKS; i += 32)
        copy(i, [&](unsigned char* to, const unsigned char* from, int inside) {
#pragma unroll 1
            for (int j = 0; j < 16; j += basis.width) {
                const int some = static_cast<int>(most(0, least(basis.width, inside - j)));
                if (some) from += j ? basis.width : 0;
                if (basis.width == 8)
                    copy_async<8>(to + j, from, some);
                else if (basis.width == 4)
                    copy_async<4>(to + j, from, some);
                else
                    to[j] = some ? *from : 0;
            }
        });
}

// Group `group` of 8 columns of a chunk as four words of two bf16; `column` tells their order.
template <Dtype T>
__device__ __forceinline__ void decode(const uint4& chunk, int group, std::uint32_t (&pairs)[4]) {
    if constexpr (T == Dtype::bf16) {
        pairs[0] = chunk.x, pairs[1] = chunk.y, pairs[2] = chunk.z, pairs[3] = chunk.w;
    } else if constexpr (T == Dtype::i8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // 7 bits in the fraction of 128 + bits, less 128, or 256 where the sign is set.
            const std::uint32_t bytes = word(chunk, group * 2 + i / 2) >> (i % 2 * 8);
            pairs[i] = add_bf16x2((bytes & 0x007F007Fu) | 0x43004300u,
                                  (bytes & 0x00800080u) | 0xC300C300u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t nibbles = word(chunk, group) >> (i * 4);
            pairs[i] = add_bf16x2((nibbles & 0x000F000Fu) | 0x43004300u, 0xC308C308u);  // - 136
        }
    }
}

// Eight f32 as the exact sums of terms[0] + terms[1] + terms[2] of bf16, in the order of `column`.
template <Dtype T>
__device__ __forceinline__ void split(const float (&values)[8], uint4 (&terms)[3]) {
    std::uint32_t parts[3][8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        parts[0][i] = __float_as_uint(values[i]) & 0xFFFF0000u;
        const float high = __uint_as_float(parts[0][i]);
        // Nothing is left of what the first term cannot hold: inf - inf would be NaN.
        const float rest = fabsf(high) < INFINITY ? values[i] - high : 0.f;
        parts[1][i] = __float_as_uint(rest) & 0xFFFF0000u;
        parts[2][i] = __float_as_uint(rest - __uint_as_float(parts[1][i]));
        // A NaN whose payload lies in the lower half would be cut to an infinity.
        if (values[i] != values[i]) parts[0][i] = 0x7FC00000u;
    }
#pragma unroll
    for (int term = 0; term < 3; ++term) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] =
                __byte_perm(parts[term][column<T>(i, 0)], parts[term][column<T>(i, 1)], 0x7632);
        terms[term] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// How the terms of identities share the 8 columns of an mma. TILES = 0: two identities, term t of
// identity i in column 2t + i, their sum in lanes t = 0. Else 8 identities a tile and all three
// terms in one sum: tile t * TILES + i / 8 has term t of identity i in column i % 8.
template <int TILES>
struct Identities {
    static constexpr int kMost = TILES ? 8 * TILES : 2;
    static constexpr int kTerms = TILES ? 3 * TILES : 1;  // tiles of terms
    static constexpr int kSums = TILES ? TILES : 1;  // tiles of sums

    __device__ static int tile(int term, int identity) {
        return TILES ? term * TILES + identity / 8 : 0;
    }
    __device__ static int column(int term, int identity) {
        return TILES ? identity % 8 : 2 * term + identity;
    }

    // sums[tile] += A * terms for one mma's depth, half `half` of the terms in b.
    __device__ __forceinline__ static void multiply(float (&sums)[kSums][4],
                                                    const std::uint32_t (&a)[4],
                                                    const uint4 (&b)[kTerms], int half) {
#pragma unroll
        for (int i = kTerms; i--;)  // the smallest terms first
            mma(sums[i % kSums], a[0], a[1], a[2], a[3], word(b[i], 2 * half),
                word(b[i], 2 * half + 1));
    }

    __device__ __forceinline__ static void add(float (&total)[kSums][4],
                                               const float (&sums)[kSums][4]) {
#pragma unroll
        for (int i = 0; i < kSums; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) total[i][j] += sums[i][j];
    }

    // Lane t's own sums; with TILES = 0 those of the three terms, added in lanes t = 0.
    __device__ __forceinline__ static float sum(float value) {
        if (TILES) return value;
        const float mid = __shfl_down_sync(0xFFFFFFFFu, value, 1);
        const float low = __shfl_down_sync(0xFFFFFFFFu, value, 2);
        return value + (mid + low);
    }
    __device__ __forceinline__ static bool owns(int t) { return TILES || t == 0; }
};

}  // namespace w2w::cuda
