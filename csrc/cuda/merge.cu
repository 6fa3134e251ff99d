// merge on the GPU: all modules in one launch, a block a tile of 64 x 64.
//
// W is read and W' written once, 16 bytes at a time where the module lies so; each thread has 64
// bytes of W on their way before the block fetches its 64 columns of A and 64 rows of B.
#include "../merge.h"

#include <type_traits>

#include "numbers.cuh"

namespace w2w::cuda {
namespace {

constexpr const char* kOp = "merge";
constexpr int kThreads = 128;
constexpr int kTile = static_cast<int>(kMergeTile);
constexpr int kRanks = 16;  // of A and B in shared memory at a time

template <class P>
__device__ __forceinline__ P* moved(P* first, i64 bytes) {
    using Byte = std::conditional_t<std::is_const_v<P>, const unsigned char, unsigned char>;
    return static_cast<Byte*>(first) + bytes;
}

template <Dtype T>
__global__ void __launch_bounds__(kThreads, 8) merge_kernel(MergeParams p) {
    constexpr int kNumbers = kChunk<T>;
    constexpr int kAcross = kTile / kNumbers;                  // chunks in a row of the tile
    constexpr int kChunks = kTile * kAcross / kThreads;        // chunks a thread
    constexpr int kRowsApart = kThreads / kAcross;
    auto* const b_a = reinterpret_cast<float*>(shared_memory());  // [kRanks][kTile]
    float* const b_b = b_a + kRanks * kTile;                      // [kRanks][kTile]
    const int thread = threadIdx.x;

    // The module: as many as begin at or before this tile, less one. Empty ones begin with the next.
    const i64 tile = blockIdx.x;
    int before = 0;
    for (i64 i = 0; i < p.modules; i += kThreads)
        before += __syncthreads_count(i + thread < p.modules && p.table[i + thread].first_tile <= tile);
    const MergeModule module = p.table[before - 1];
    const i64 across = ceil_div(module.in, kTile), inner = tile - module.first_tile;
    const i64 row_0 = inner / across * kTile, column_0 = inner % across * kTile;
    const void* const weight = moved(p.weight, module.weight_at);
    void* const out = moved(p.out, module.out_at);
    const void *const a = moved(p.a, module.a_at), *const b = moved(p.b, module.b_at);
    const auto addresses = reinterpret_cast<std::uintptr_t>(weight) | reinterpret_cast<std::uintptr_t>(out);
    const bool vector = addresses % 16 == 0 && module.in % kNumbers == 0;

    const int r_0 = thread / kAcross, c_0 = thread % kAcross * kNumbers;
    const i64 count = least(kNumbers, module.in - column_0 - c_0);
    uint4 chunks[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        const i64 row = row_0 + r_0 + i * kRowsApart;
        const i64 here = row < module.out ? count : 0;
        chunks[i] = load_chunk<T>(weight, row * module.in + column_0 + c_0, here, vector);
    }

    float sums[kChunks][kNumbers] = {};
    for (i64 first = 0; first < p.rank; first += kRanks) {
        const int ranks = static_cast<int>(least(kRanks, p.rank - first));
        if (first) __syncthreads();
        for (int i = thread; i < ranks * kTile; i += kThreads) {
            const i64 column = column_0 + i % kTile, r = first + i / kTile;
            b_a[i] = column < module.in ? load_number(a, p.adapter_dtype, r * module.in + column) : 0.f;
            const i64 row = row_0 + i / ranks, q = first + i % ranks;
            b_b[i % ranks * kTile + i / ranks] =
                row < module.out ? load_number(b, p.adapter_dtype, row * p.rank + q) : 0.f;
        }
        __syncthreads();
        for (int r = 0; r < ranks; ++r) {
            float b_as[kNumbers];
#pragma unroll
            for (int j = 0; j < kNumbers; ++j) b_as[j] = b_a[r * kTile + c_0 + j];
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                const float b_bs = b_b[r * kTile + r_0 + i * kRowsApart];
#pragma unroll
                for (int j = 0; j < kNumbers; ++j) sums[i][j] = fmaf(b_bs, b_as[j], sums[i][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        const i64 row = row_0 + r_0 + i * kRowsApart;
        float w[kNumbers];
        unpack<T>(chunks[i], w);
#pragma unroll
        for (int j = 0; j < kNumbers; ++j) w[j] = fmaf(p.scale, sums[i][j], w[j]);
        const i64 here = row < module.out ? count : 0;
        store_chunk<T>(out, row * module.in + column_0 + c_0, here, vector, w);
    }
}

}  // namespace

void merge(const MergeParams& p, void* stream) {
    with_dtype(p.dtype, [&](auto dtype) {
        launch(kOp, merge_kernel<decltype(dtype)::value>, p.modules > 0 ? p.tiles : 0, kThreads,
               std::size_t{2} * kRanks * kTile * sizeof(float), stream, p);
    });
}

}  // namespace w2w::cuda
