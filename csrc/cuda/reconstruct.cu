// reconstruct on the GPU: one stream over V, for up to 16 identities at a time.
//
// 16, 8 and 4 bits: tensor cores. Each warp copies 8 KB of its rows ahead while it multiplies
// 8 KB; the terms of c are made once a block and step, in fragment order, for all of its warps.
// f32: a warp takes 4 rows, multiplies and adds.
#include "../reconstruct.h"

#include "basis.cuh"

namespace w2w::cuda {
namespace {

constexpr const char* kOp = "reconstruct";
constexpr int kStages = 2;

// Tiles of 16 rows a warp, and steps of 128 bytes a copy. One or two identities: long pieces of
// few rows, which DRAM likes best. More: more rows share the terms of c, which then weigh as much
// as V; at 4 bits shared memory allows half as much.
template <Dtype T, int TILES>
struct Shape {
    static constexpr int kTall = TILES ? 2 : 1;
    static constexpr int kSteps = !TILES ? 4 : T == Dtype::u4 && TILES == 2 ? 1 : 2;
    static constexpr int kRows = 16 * kTall;
    static constexpr int kChunks = kSteps * kStepChunks;
    static constexpr int kSlot = kRows * kChunks;  // of 16 bytes, for a warp's stage
    static constexpr int kDepths = kStepColumns<T> / 32;  // pairs of mma depths in a step
    static constexpr int kTerms =
        kDepths * Identities<TILES>::kTerms * 32;  // of 16 bytes, a step's
    static std::size_t shared(int warps) { return 16 * (warps * kStages * kSlot + 2 * kTerms); }
};

__device__ void store(const ReconstructParams& p, i64 row, i64 identity, float acc) {
    const float gain =
        p.basis.row_scale ? p.basis.std[row] * p.basis.row_scale[row] : p.basis.std[row];
    const float mean = p.basis.mean ? p.basis.mean[row] : 0.f;
    store_number(p.out, p.out_dtype, identity * p.out_stride + row, fmaf(gain, acc, mean));
}

// The terms of 8 columns of c at a time, for one step, where the lanes will look for them.
template <Dtype T, int TILES>
__device__ void write_terms(const ReconstructParams& p, i64 first, int identities, i64 step,
                            bool vector, uint4* terms) {
    constexpr int kUnits = kStepColumns<T> / 8;
    for (int unit = threadIdx.x; unit < identities * kUnits; unit += blockDim.x) {
        const int identity = unit / kUnits, at = unit % kUnits;
        const i64 begin = step * kStepColumns<T> + at * 8;
        const float* c = p.c + (first + identity) * p.c_stride + begin;
        float values[8];
        if (vector && begin + 8 <= p.basis.m) {
            const float4 low = __ldg(reinterpret_cast<const float4*>(c));
            const float4 high = __ldg(reinterpret_cast<const float4*>(c) + 1);
            values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
            values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = begin + i < p.basis.m ? __ldg(c + i) : 0.f;
        }
        uint4 three[3];
        split<T>(values, three);
        const int group = at % kGroups<T>, t = at / kGroups<T> % 4, half = at / kGroups<T> / 4;
        const int depth = half * kGroups<T> + group;
#pragma unroll
        for (int term = 0; term < 3; ++term) {
            const int tile =
                depth * Identities<TILES>::kTerms + Identities<TILES>::tile(term, identity);
            terms[tile * 32 + Identities<TILES>::column(term, identity) * 4 + t] = three[term];
        }
    }
}

template <Dtype T, int TILES>
__global__ void __launch_bounds__(128)
    tensor_kernel(ReconstructParams p, Stored basis, int groups, bool vector) {
    using S = Shape<T, TILES>;
    using I = Identities<TILES>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int g = lane / 4, t = lane % 4;
    const i64 row = (blockIdx.x / groups * i64{warps} + warp) * S::kRows;
    const i64 first = static_cast<i64>(blockIdx.x % groups) * I::kMost;
    const int identities = static_cast<int>(least(I::kMost, p.k - first));
    auto* memory = reinterpret_cast<uint4*>(shared_memory());
    uint4* const slots = memory + warp * kStages * S::kSlot;
    uint4* const terms = memory + warps * kStages * S::kSlot;
    // Columns of identities that are not there are never written again.
    for (int i = threadIdx.x; i < 2 * S::kTerms; i += blockDim.x) terms[i] = make_uint4(0, 0, 0, 0);

    constexpr auto kReaders = Readers::rows_of_a_tile;
    const int steps = static_cast<int>(ceil_div(basis.row_bytes, kRowBytes));
    // The tensor cores cut a sum instead of rounding it: their runs are kept to half a step.
    float total[S::kTall][I::kSums][4] = {};
    // Step -1 only starts copies and writes the terms of step 0.
    for (int step = -1, filled = 0; step < steps; ++step) {
        const int stage = step < 0 ? 0 : step / S::kSteps, inner = step - stage * S::kSteps;
        uint4* const slot = slots + stage % kStages * S::kSlot;
        if (inner <= 0) {
            __syncwarp();  // all lanes have read the slot that is filled now
#pragma unroll 1
            for (; filled < stage + kStages; ++filled) {
                if (filled * S::kSteps < steps)
                    fill<kReaders, S::kRows, S::kChunks>(basis, slots + filled % kStages * S::kSlot,
                                                         row, i64{filled} * S::kSteps * kRowBytes,
                                                         lane);
                copies_commit();
            }
            if (step >= 0) copies_wait<kStages - 1>();
        }
        __syncthreads();  // this step's rows and terms are there, the last step's terms are read
        if (step + 1 < steps)
            write_terms<T, TILES>(p, first, identities, step + 1, vector,
                                  terms + (step + 1) % 2 * S::kTerms);
        if (step < 0) continue;
        const uint4* const now = terms + step % 2 * S::kTerms;

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 upper[S::kTall], lower[S::kTall];  // of row g and of row g + 8
#pragma unroll
            for (int tall = 0; tall < S::kTall; ++tall) {
                const int r = tall * 16 + g, chunk = inner * kStepChunks + half * 4 + t;
                upper[tall] = slot[r * S::kChunks + place<kReaders>(r, chunk)];
                lower[tall] = slot[(r + 8) * S::kChunks + place<kReaders>(r + 8, chunk)];
            }
            float run[S::kTall][I::kSums][4] = {};
#pragma unroll
            for (int group = 0; group < kGroups<T>; ++group) {
                uint4 b[I::kTerms];
#pragma unroll
                for (int i = 0; i < I::kTerms; ++i)
                    b[i] = now[((half * kGroups<T> + group) * I::kTerms + i) * 32 + lane];
#pragma unroll
                for (int tall = 0; tall < S::kTall; ++tall) {
                    std::uint32_t up[4], down[4];
                    decode<T>(upper[tall], group, up);
                    decode<T>(lower[tall], group, down);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const std::uint32_t a[4] = {up[2 * i], down[2 * i], up[2 * i + 1],
                                                    down[2 * i + 1]};
                        I::multiply(run[tall], a, b, i);
                    }
                }
            }
#pragma unroll
            for (int tall = 0; tall < S::kTall; ++tall) I::add(total[tall], run[tall]);
        }
    }

#pragma unroll
    for (int tall = 0; tall < S::kTall; ++tall)
#pragma unroll
        for (int i = 0; i < I::kSums; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float sum = I::sum(total[tall][i][j]);
                const i64 r = row + tall * 16 + g + j / 2 * 8;
                const int identity = i * 8 + 2 * t + j % 2;
                if (I::owns(t) && identity < identities && r < p.basis.d)
                    store(p, r, first + identity, sum);
            }
}

template <Dtype T, int TILES>
void tensor(const ReconstructParams& p, void* stream) {
    using S = Shape<T, TILES>;
    // Few rows: smaller blocks, so that there are enough of them.
    int warps = 4;
    while (warps > 1 && ceil_div(p.basis.d, S::kRows * warps) < 256) warps /= 2;
    const i64 groups = ceil_div(p.k, Identities<TILES>::kMost);
    const bool vector = aligned(p.c, 16) && (p.k == 1 || p.c_stride % 4 == 0);
    launch(kOp, tensor_kernel<T, TILES>, ceil_div(p.basis.d, S::kRows * warps) * groups, 32 * warps,
           S::shared(warps), stream, p, stored(p.basis), static_cast<int>(groups), vector);
}

constexpr int kRowsOfF32 = 4;  // share a warp's c

template <int K>
__global__ void __launch_bounds__(128, K <= 4 ? 4 : 2)
    f32_kernel(ReconstructParams p, int groups, bool vector) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 row = (blockIdx.x / groups * i64{4} + warp) * kRowsOfF32;
    const i64 first = static_cast<i64>(blockIdx.x % groups) * K;
    if (row >= p.basis.d) return;
    const i64 m = p.basis.m;
    const float *v[kRowsOfF32], *c[K];
#pragma unroll
    for (int r = 0; r < kRowsOfF32; ++r)  // rows that are not there: the last one again
        v[r] = static_cast<const float*>(p.basis.rows) +
               least(row + r, p.basis.d - 1) * p.basis.stride;
#pragma unroll
    for (int i = 0; i < K; ++i) c[i] = p.c + least(first + i, p.k - 1) * p.c_stride;

    float acc[kRowsOfF32][K] = {};
    const i64 whole = vector ? m / 4 * 4 : 0;  // columns taken four at a time
#pragma unroll(K == 1 ? 4 : 1)
    for (i64 at = lane * 4; at < whole; at += 128) {
        float4 b_v[kRowsOfF32];
#pragma unroll
        for (int r = 0; r < kRowsOfF32; ++r)
            b_v[r] = __ldcs(reinterpret_cast<const float4*>(v[r] + at));
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const float4 b_c = __ldg(reinterpret_cast<const float4*>(c[i] + at));
#pragma unroll
            for (int r = 0; r < kRowsOfF32; ++r) {
                acc[r][i] = fmaf(b_v[r].x, b_c.x, acc[r][i]);
                acc[r][i] = fmaf(b_v[r].y, b_c.y, acc[r][i]);
                acc[r][i] = fmaf(b_v[r].z, b_c.z, acc[r][i]);
                acc[r][i] = fmaf(b_v[r].w, b_c.w, acc[r][i]);
            }
        }
    }
#pragma unroll 1
    for (i64 at = whole + lane; at < m; at += 32)
#pragma unroll
        for (int i = 0; i < K; ++i)
#pragma unroll
            for (int r = 0; r < kRowsOfF32; ++r) acc[r][i] = fmaf(v[r][at], c[i][at], acc[r][i]);
#pragma unroll
    for (int r = 0; r < kRowsOfF32; ++r)
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const float sum = warp_sum(acc[r][i]);
            if (lane == (r * K + i) % 32 && row + r < p.basis.d && first + i < p.k)
                store(p, row + r, first + i, sum);
        }
}

template <int K>
void f32(const ReconstructParams& p, void* stream) {
    const i64 groups = ceil_div(p.k, K);
    const bool vector = aligned(p.basis.rows, 16) && (p.basis.d == 1 || p.basis.stride % 4 == 0) &&
                        aligned(p.c, 16) && (p.k == 1 || p.c_stride % 4 == 0);
    launch(kOp, f32_kernel<K>, ceil_div(p.basis.d, 4 * kRowsOfF32) * groups, 128, 0, stream, p,
           static_cast<int>(groups), vector);
}

template <Dtype T>
void by_identities(const ReconstructParams& p, void* stream) {
    if (p.k <= 2)
        tensor<T, 0>(p, stream);
    else
        tensor<T, 2>(p, stream);
}

}  // namespace

void reconstruct(const ReconstructParams& p, void* stream) {
    if (p.k <= 0 || p.basis.d <= 0) return;
    if (p.basis.dtype == Dtype::bf16) return by_identities<Dtype::bf16>(p, stream);
    if (p.basis.dtype == Dtype::i8) return by_identities<Dtype::i8>(p, stream);
    if (p.basis.dtype == Dtype::u4) return by_identities<Dtype::u4>(p, stream);
    if (p.k == 1)
        f32<1>(p, stream);
    else if (p.k <= 4)
        f32<4>(p, stream);
    else
        f32<16>(p, stream);
}

}  // namespace w2w::cuda
