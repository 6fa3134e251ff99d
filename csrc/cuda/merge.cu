// merge on the GPU: all modules in one launch, a block a tile of 64 x 64.
//
// W is read and W' written once, 16 bytes at a time where the module lies so; each thread has 32
// bytes of W on their way before the block fetches its 64 columns of A and 64 rows of B.
#include "../merge.h"

#include <type_traits>

#include "numbers.cuh"

namespace w2w::cuda {
namespace {

constexpr const char* kOp = "merge";
constexpr int kThreads = 256;
constexpr int kTile = static_cast<int>(kMergeTile);
constexpr int kRanks = 16;  // of A and B in shared memory at a time; above, sums wait in registers

template <class P>
__device__ __forceinline__ P* moved(P* first, i64 bytes) {
    using Byte = std::conditional_t<std::is_const_v<P>, const unsigned char, unsigned char>;
    return static_cast<Byte*>(first) + bytes;
}

template <Dtype T, bool MANY_RANKS>
__global__ void __launch_bounds__(kThreads, MANY_RANKS ? 2 : 4) merge_kernel(MergeParams p) {
    constexpr int kNumbers = kChunk<T>;
    constexpr int kAcross = kTile / kNumbers;  // chunks in a row of the tile
    constexpr int kChunks = kTile * kAcross / kThreads;  // chunks a thread
    constexpr int kRowsApart = kThreads / kAcross;
    const int most_ranks = static_cast<int>(least(kRanks, p.rank));
    auto* const b_a = reinterpret_cast<float*>(shared_memory());  // [most_ranks][kTile]
    float* const b_b = b_a + most_ranks * kTile;  // [most_ranks][kTile]
    const int thread = threadIdx.x;

    // The module: as many as begin at or before this tile, less one. Empty ones begin with the
    // next.
    const i64 tile = blockIdx.x;
    int before = 0;
    for (i64 i = 0; i < p.modules; i += kThreads)
        before +=
            __syncthreads_count(i + thread < p.modules && p.table[i + thread].first_tile <= tile);
    const MergeModule module = p.table[before - 1];
    const i64 across = ceil_div(module.in, kTile), inner = tile - module.first_tile;
    const i64 row_0 = inner / across * kTile, column_0 = inner % across * kTile;
    const void* const weight = moved(p.weight, module.weight_at);
    void* const out = moved(p.out, module.out_at);
    const void *const a = moved(p.a, module.a_at), *const b = moved(p.b, module.b_at);
    const auto addresses =
        reinterpret_cast<std::uintptr_t>(weight) | reinterpret_cast<std::uintptr_t>(out);
    const bool vector = addresses % 16 == 0 && module.in % kNumbers == 0;

    // This thread's numbers: kNumbers in each of kChunks rows, kRowsApart apart.
    const int r_0 = thread / kAcross, c_0 = thread % kAcross * kNumbers;
    const int count = static_cast<int>(least(kNumbers, module.in - column_0 - c_0));
    const int rows = static_cast<int>(least(kTile, module.out - row_0)) - r_0;
    const i64 at = (row_0 + r_0) * module.in + column_0 + c_0, apart = kRowsApart * module.in;
    uint4 chunks[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
        chunks[i] =
            load_chunk<T>(weight, at + i * apart, i * kRowsApart < rows ? count : 0, vector);

    // Ranks first.. of the tile's A and B, zero outside of the module.
    const auto stage = [&](i64 first, int ranks) {
#pragma unroll 1
        for (int i = thread; i < ranks * kTile; i += kThreads) {
            const i64 column = column_0 + i % kTile, row = row_0 + i / ranks;
            const i64 r = first + i / kTile, q = first + i % ranks;
            b_a[i] =
                column < module.in ? load_number(a, p.adapter_dtype, r * module.in + column) : 0.f;
            b_b[i % ranks * kTile + i / ranks] =
                row < module.out ? load_number(b, p.adapter_dtype, row * p.rank + q) : 0.f;
        }
        __syncthreads();
    };
    const auto add = [&](int i, int ranks, float (&sums)[kNumbers]) {
#pragma unroll 1
        for (int r = 0; r < ranks; ++r) {
            const float b_bs = b_b[r * kTile + r_0 + i * kRowsApart];
            const auto* b_as = reinterpret_cast<const float4*>(b_a + r * kTile + c_0);
#pragma unroll
            for (int j = 0; j < kNumbers; j += 4) {
                const float4 four = b_as[j / 4];
                sums[j] = fmaf(b_bs, four.x, sums[j]),
                sums[j + 1] = fmaf(b_bs, four.y, sums[j + 1]);
                sums[j + 2] = fmaf(b_bs, four.z, sums[j + 2]);
                sums[j + 3] = fmaf(b_bs, four.w, sums[j + 3]);
            }
        }
    };
    const auto write = [&](int i, const float (&sums)[kNumbers]) {
        float w[kNumbers];
        unpack<T>(chunks[i], w);
#pragma unroll
        for (int j = 0; j < kNumbers; ++j) w[j] = fmaf(p.scale, sums[j], w[j]);
        store_chunk<T>(out, at + i * apart, i * kRowsApart < rows ? count : 0, vector, w);
    };

    if constexpr (MANY_RANKS) {
        float sums[kChunks][kNumbers] = {};
        for (i64 first = 0; first < p.rank; first += kRanks) {
            const int ranks = static_cast<int>(least(kRanks, p.rank - first));
            if (first) __syncthreads();
            stage(first, ranks);
#pragma unroll
            for (int i = 0; i < kChunks; ++i) add(i, ranks, sums[i]);
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) write(i, sums[i]);
    } else {
        stage(0, most_ranks);
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            float sums[kNumbers] = {};
            add(i, most_ranks, sums);
            write(i, sums);
        }
    }
}

}  // namespace

void merge(const MergeParams& p, void* stream) {
    with_dtype(p.dtype, [&](auto dtype) {
        constexpr Dtype kType = decltype(dtype)::value;
        const std::size_t shared = 2 * sizeof(float) * kTile * least(kRanks, most(0, p.rank));
        launch(kOp, p.rank > kRanks ? merge_kernel<kType, true> : merge_kernel<kType, false>,
               p.modules > 0 ? p.tiles : 0, kThreads, shared, stream, p);
    });
}

}  // namespace w2w::cuda
