// adapted_linear on the GPU: x, base and y cross memory once each.
//
// low_rank   a warp has 4 tokens: x in 16 bytes a lane, sums over the warp, base in and y out. Down
//            and up lie in shared memory as f32, shared by the block's 16 tokens.
// outer      a block sums 256 tokens of a sample; then each adapter's parts are added in one order.
#include "../adapted_linear.h"

#include "numbers.cuh"

namespace w2w::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = 4;  // a warp
constexpr int kNumbers = 4096;  // of down or up in shared memory at a time: 16 KB

__device__ __forceinline__ i64 adapter(const i64* index, i64 adapters, i64 b) {
    return index ? index[b] : adapters == 1 ? 0 : b;
}

// Columns first.. of one adapter's down or up as f32: [R][numbers of a chunk / 4][chunk][4], so
// that lanes read 16 bytes side by side. Ranks and columns that are not there are 0.
template <int R, int CHUNK>
__device__ void stage(const void* from, Dtype type, i64 stride_r, i64 stride_n, int rank, i64 first,
                      i64 n, float* to) {
    constexpr int kColumns = kNumbers / R;
    const int columns = static_cast<int>(least(kColumns, ceil_div(n - first, CHUNK) * CHUNK));
    for (int i = threadIdx.x; i < R * columns; i += kThreads) {
        // In the order of memory, so that neighbours read together.
        const bool by_rank = stride_r < stride_n;
        const int r = by_rank ? i % R : i / columns, column = by_rank ? i / R : i % columns;
        const bool here = r < rank && first + column < n;
        const int plane = column % CHUNK / 4, chunk = column / CHUNK;
        to[((r * (CHUNK / 4) + plane) * (kColumns / CHUNK) + chunk) * 4 + column % 4] =
            here ? load_number(from, type, r * stride_r + (first + column) * stride_n) : 0.f;
    }
}

// What stage left for chunk `chunk` of rank r.
template <int R, int CHUNK>
__device__ __forceinline__ void staged(const float* from, int r, int chunk,
                                       float (&values)[CHUNK]) {
    constexpr int kChunks = kNumbers / R / CHUNK;
#pragma unroll
    for (int plane = 0; plane < CHUNK / 4; ++plane) {
        const auto* four = reinterpret_cast<const float4*>(from);
        const float4 part = four[(r * (CHUNK / 4) + plane) * kChunks + chunk];
        values[plane * 4] = part.x, values[plane * 4 + 1] = part.y;
        values[plane * 4 + 2] = part.z, values[plane * 4 + 3] = part.w;
    }
}

struct Vectors {
    bool x, base, y;  // lie so that 16 bytes can be read or written at a time
};

template <Dtype T, int R>
__global__ void __launch_bounds__(kThreads)
    low_rank_kernel(LowRankParams p, i64 blocks, Vectors vectors) {
    constexpr int kN = kChunk<T>, kColumns = kNumbers / R;
    auto* const shared = reinterpret_cast<float*>(shared_memory());
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = static_cast<int>(p.rank);
    const i64 b = blockIdx.x / blocks, a = adapter(p.index, p.adapters, b);
    const i64 token = (blockIdx.x % blocks * kWarps + warp) * kTokens;
    const i64 offset_down = a * p.down_a * size_of(p.adapter_dtype);
    const i64 offset_up = a * p.up_a * size_of(p.adapter_dtype);
    const void* const down = static_cast<const unsigned char*>(p.down) + offset_down;
    const void* const up = static_cast<const unsigned char*>(p.up) + offset_up;

    // 16 bytes of each of the warp's tokens, zero where there is no such token or column.
    const auto load = [&](const void* from, i64 stride_b, i64 stride_t, i64 column, i64 n,
                          bool vector, uint4(&chunks)[kTokens]) {
#pragma unroll
        for (int q = 0; q < kTokens; ++q) {
            const i64 count = token + q < p.tokens ? n - column : 0;
            chunks[q] =
                load_chunk<T>(from, b * stride_b + (token + q) * stride_t + column, count, vector);
        }
    };

    float s[kTokens][R] = {};
    for (i64 first = 0; first < p.in; first += kColumns) {
        const i64 end = least(first + kColumns, p.in);
        uint4 next[kTokens];
        load(p.x, p.x_b, p.x_t, first + lane * kN, end, vectors.x, next);
        if (first) __syncthreads();
        stage<R, kN>(down, p.adapter_dtype, p.down_r, p.down_i, rank, first, p.in, shared);
        __syncthreads();
        for (i64 column = first + lane * kN; column < end; column += 32 * kN) {
            float x[kTokens][kN];
#pragma unroll
            for (int q = 0; q < kTokens; ++q) unpack<T>(next[q], x[q]);
            if (column + 32 * kN < end)
                load(p.x, p.x_b, p.x_t, column + 32 * kN, end, vectors.x, next);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float d[kN];
                staged<R, kN>(shared, r, static_cast<int>(column - first) / kN, d);
#pragma unroll
                for (int q = 0; q < kTokens; ++q)
#pragma unroll
                    for (int j = 0; j < kN; ++j) s[q][r] = fmaf(x[q][j], d[j], s[q][r]);
            }
        }
    }

    uint4 next[kTokens] = {};
    if (p.base) load(p.base, p.base_b, p.base_t, lane * kN, p.out, vectors.base, next);
    const float scale = p.scales ? p.scales[b] : p.scale;
#pragma unroll
    for (int q = 0; q < kTokens; ++q)
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float sum = warp_sum(s[q][r]);
            if (lane == (q * R + r) % 32 && r < rank && token + q < p.tokens)
                p.s[(b * p.tokens + token + q) * rank + r] = sum;
            s[q][r] = r < rank ? scale * sum : 0.f;  // 0 times an infinity of x would be NaN
        }
    if (!p.y) return;

    for (i64 first = 0; first < p.out; first += kColumns) {
        const i64 end = least(first + kColumns, p.out);
        __syncthreads();
        stage<R, kN>(up, p.adapter_dtype, p.up_r, p.up_n, rank, first, p.out, shared);
        __syncthreads();
        if (first && p.base)
            load(p.base, p.base_b, p.base_t, first + lane * kN, end, vectors.base, next);
        for (i64 column = first + lane * kN; column < end; column += 32 * kN) {
            float y[kTokens][kN];
#pragma unroll
            for (int q = 0; q < kTokens; ++q) unpack<T>(next[q], y[q]);
            if (p.base && column + 32 * kN < end)
                load(p.base, p.base_b, p.base_t, column + 32 * kN, end, vectors.base, next);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float u[kN];
                staged<R, kN>(shared, r, static_cast<int>(column - first) / kN, u);
#pragma unroll
                for (int q = 0; q < kTokens; ++q)
#pragma unroll
                    for (int j = 0; j < kN; ++j) y[q][j] = fmaf(s[q][r], u[j], y[q][j]);
            }
#pragma unroll
            for (int q = 0; q < kTokens; ++q) {
                const i64 count = token + q < p.tokens ? end - column : 0;
                store_chunk<T>(p.y, b * p.y_b + (token + q) * p.y_t + column, count, vectors.y,
                               y[q]);
            }
        }
    }
}

constexpr int kOuterWarps = 8;
constexpr i64 kTokensAPart = 256;

// parts [sample, part, rank, width]: a warp sums every eighth token, R ranks, 16 bytes a lane.
template <Dtype T, int R>
__global__ void __launch_bounds__(32 * kOuterWarps)
    outer_kernel(OuterParams p, i64 parts, i64 ranks, i64 tiles, bool vector, float* out) {
    constexpr int kN = kChunk<T>, kWidth = 32 * kN;
    auto* const shared = reinterpret_cast<float*>(shared_memory());  // [kOuterWarps][R][kWidth]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 at = blockIdx.x;  // neighbours share features
    const i64 r_0 = at % ranks * R;
    const i64 n_0 = at / ranks % tiles * kWidth;
    const i64 part = at / ranks / tiles % parts, b = at / ranks / tiles / parts;
    const i64 end = least((part + 1) * kTokensAPart, p.tokens), column = n_0 + lane * kN;

    float acc[R][kN] = {};
#pragma unroll 4
    for (i64 token = part * kTokensAPart + warp; token < end; token += kOuterWarps) {
        const i64 feature = b * p.feature_b + token * p.feature_t + column;
        float values[kN];
        unpack<T>(load_chunk<T>(p.feature, feature, p.width - column, vector), values);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (r_0 + r >= p.rank) continue;
            const float c = __ldg(p.coefficient + (b * p.tokens + token) * p.rank + r_0 + r);
#pragma unroll
            for (int j = 0; j < kN; ++j) acc[r][j] = fmaf(c, values[j], acc[r][j]);
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < kN; ++j) shared[(warp * R + r) * kWidth + j * 32 + lane] = acc[r][j];
    __syncthreads();
    for (int i = threadIdx.x; i < R * kWidth; i += 32 * kOuterWarps) {
        const i64 r = r_0 + i / kWidth, n = n_0 + i % kWidth;
        if (r >= p.rank || n >= p.width) continue;
        const int from = i / kWidth * kWidth + i % kN * 32 + i % kWidth / kN;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kOuterWarps; ++w) sum += shared[w * R * kWidth + from];
        out[((b * parts + part) * p.rank + r) * p.width + n] = sum;
    }
}

// out[adapter]: the parts of its samples, times each sample's scale, in order.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(OuterParams p, i64 parts, i64 blocks, const float* sums) {
    const i64 a = blockIdx.x / blocks, n = p.rank * p.width;
    const i64 i = blockIdx.x % blocks * kThreads + threadIdx.x;
    if (i >= n) return;
    const bool all = p.index || p.adapters == 1;
    const i64 first = all ? 0 : a, last = all ? p.samples : least(a + 1, p.samples);
    float acc = 0.f;
    for (i64 b = first; b < last; ++b) {
        if (p.index && p.index[b] != a) continue;
        float sum = 0.f;
#pragma unroll 8
        for (i64 part = 0; part < parts; ++part) sum += sums[(b * parts + part) * n + i];
        acc = fmaf(p.scales ? p.scales[b] : p.scale, sum, acc);
    }
    store_number(p.out, p.out_dtype, a * p.out_a + i / p.width * p.out_r + i % p.width * p.out_n,
                 acc);
}

// Whether rows of a [b, t] of tensors begin at multiples of 16 bytes.
bool vectors(const void* p, Dtype type, i64 samples, i64 stride_b, i64 tokens, i64 stride_t) {
    const i64 numbers = 16 / size_of(type);
    return aligned(p, 16) && (samples <= 1 || stride_b % numbers == 0) &&
           (tokens <= 1 || stride_t % numbers == 0);
}

template <Dtype T, int R>
void run_low_rank(const LowRankParams& p, void* stream) {
    const Vectors all{vectors(p.x, T, p.samples, p.x_b, p.tokens, p.x_t),
                      vectors(p.base, T, p.samples, p.base_b, p.tokens, p.base_t),
                      vectors(p.y, T, p.samples, p.y_b, p.tokens, p.y_t)};
    const i64 blocks = ceil_div(p.tokens, kWarps * kTokens);
    launch("low_rank", low_rank_kernel<T, R>, p.samples * blocks, kThreads,
           kNumbers * sizeof(float), stream, p, blocks, all);
}

template <Dtype T, int R>
void run_outer(const OuterParams& p, i64 parts, float* sums, void* stream) {
    constexpr i64 kWidth = 32 * kChunk<T>;
    const i64 ranks = ceil_div(p.rank, R), tiles = ceil_div(p.width, kWidth);
    const bool vector = vectors(p.feature, T, p.samples, p.feature_b, p.tokens, p.feature_t);
    launch("outer", outer_kernel<T, R>, p.samples * parts * tiles * ranks, 32 * kOuterWarps,
           kOuterWarps * R * kWidth * sizeof(float), stream, p, parts, ranks, tiles, vector, sums);
}

}  // namespace

void low_rank(const LowRankParams& p, void* stream) {
    if (p.samples <= 0 || p.tokens <= 0) return;
    with_dtype(p.dtype, [&](auto dtype) {
        constexpr Dtype kType = decltype(dtype)::value;
        if (p.rank == 1)
            run_low_rank<kType, 1>(p, stream);
        else if (p.rank <= 4)
            run_low_rank<kType, 4>(p, stream);
        else
            run_low_rank<kType, 16>(p, stream);
    });
}

std::size_t outer_scratch(const OuterParams& p) {
    if (p.samples <= 0 || p.tokens <= 0 || p.width <= 0) return 0;
    const i64 parts = ceil_div(p.tokens, kTokensAPart);
    return static_cast<std::size_t>(p.samples * parts * p.rank * p.width) * sizeof(float);
}

void outer(const OuterParams& p, void* scratch, void* stream) {
    if (p.adapters <= 0 || p.width <= 0) return;
    const i64 parts = ceil_div(p.tokens, kTokensAPart);
    auto* const sums = static_cast<float*>(scratch);
    if (p.samples > 0 && parts > 0)
        with_dtype(p.dtype, [&](auto dtype) {
            constexpr Dtype kType = decltype(dtype)::value;
            if (p.rank == 1)
                run_outer<kType, 1>(p, parts, sums, stream);
            else
                run_outer<kType, 4>(p, parts, sums, stream);
        });
    const i64 blocks = ceil_div(p.rank * p.width, kThreads);
    launch("outer", gather_kernel, p.adapters * blocks, kThreads, 0, stream, p, parts, blocks,
           sums);
}

}  // namespace w2w::cuda
