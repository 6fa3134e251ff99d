// project on the GPU: three kernels, deterministic.
//
//   z      z of all identities, once: f32, or as terms in the order the tensor cores read them
//   parts  each block sums up to 1,024 rows for its columns
//   sum    adds the parts of a sum in one order
//
// 16, 8 and 4 bits: the columns of V are the rows of an mma, a warp has 128 bytes of each row. The
// tensor cores cut a sum instead of rounding it: they sum 32 rows at a time.
#include "../project.h"

#include "basis.cuh"

namespace w2w::cuda {
namespace {

constexpr const char* kOp = "project";
constexpr int kWarps = 4;
constexpr int kStages = 3;
constexpr int kStageRows = 32;  // two depths of mma, eight rows a lane
constexpr int kSlot = kStageRows * kStepChunks;
constexpr int kSumThreads = 128;

// How a call is cut up: by d, m, k and the stored type alone.
struct Plan {
    i64 rows, parts;  // of d a part
    i64 columns, blocks;  // of m a block
    i64 identities, groups, terms;  // identities a block; tiles of their terms (f32: 0)
    std::size_t z, sums;  // bytes of scratch
};

Plan plan(const ProjectParams& p) {
    const Basis& basis = p.basis;
    const int columns = basis.dtype == Dtype::f32    ? 128
                        : basis.dtype == Dtype::bf16 ? kStepColumns<Dtype::bf16>
                        : basis.dtype == Dtype::i8   ? kStepColumns<Dtype::i8>
                                                     : kStepColumns<Dtype::u4>;
    Plan plan{};
    plan.columns = i64{columns} * kWarps;
    plan.blocks = ceil_div(basis.m, plan.columns);
    const i64 wanted = most(1, 1024 / most(1, plan.blocks));
    const i64 rows = ceil_div(ceil_div(basis.d, wanted), kStageRows) * kStageRows;
    plan.rows = most(128, least(1024, rows));
    plan.parts = most(1, ceil_div(basis.d, plan.rows));
    if (basis.dtype == Dtype::f32) {
        plan.identities = p.k == 1 ? 1 : p.k <= 4 ? 4 : 16;
        plan.groups = ceil_div(p.k, plan.identities);
        plan.z = ceil_div(p.k * basis.d * 4, 256) * 256;
    } else {
        // At 4 bits a warp has four times the columns of 16 bits: registers for 8 identities. The
        // next group's block runs beside it and finds V in the cache.
        plan.identities = p.k <= 2 ? 2 : basis.dtype == Dtype::u4 ? 8 : 16;
        plan.groups = ceil_div(p.k, plan.identities);
        plan.terms = p.k <= 2 ? 1 : plan.identities / 8 * 3;
        plan.z =
            static_cast<std::size_t>(plan.groups * ceil_div(basis.d, kStageRows) * plan.terms) *
            512;
    }
    plan.sums = plan.parts > 1 ? static_cast<std::size_t>(plan.parts * p.k * basis.m) * 4 : 0;
    return plan;
}

__device__ float z_of(const ProjectParams& p, i64 identity, i64 row) {
    float z = load_number(p.source, p.source_dtype, identity * p.source_stride + row);
    const float std = p.basis.std[row];
    if (p.divide) {
        // x / inf is 0 for every finite x, and NaN or inf in a fixed coordinate shows as NaN.
        z = (z - (p.basis.mean ? p.basis.mean[row] : 0.f)) / (std == 0.f ? INFINITY : std);
    } else {
        z *= std;
    }
    return p.basis.row_scale ? z * p.basis.row_scale[row] : z;
}

__global__ void __launch_bounds__(128) z_f32_kernel(ProjectParams p, float* z) {
    const i64 i = blockIdx.x * i64{128} + threadIdx.x;
    if (i < p.k * p.basis.d) z[i] = z_of(p, i / p.basis.d, i % p.basis.d);
}

// terms [group][32 rows][tile of terms][lane]: eight rows of one term of one identity each. A
// thread: eight rows of one identity, of those that the group could have.
template <int TILES>
__global__ void __launch_bounds__(128) z_terms_kernel(ProjectParams p, uint4* terms, i64 units) {
    using I = Identities<TILES>;
    const i64 unit = blockIdx.x * i64{128} + threadIdx.x;
    if (unit >= units) return;
    const i64 stages = ceil_div(p.basis.d, kStageRows);
    const int t = static_cast<int>(unit % 4);
    const i64 stage = unit / 4 % stages, group = unit / 4 / stages / I::kMost;
    const int inner = static_cast<int>(unit / 4 / stages % I::kMost);
    const i64 identity = group * I::kMost + inner, row = stage * kStageRows + t * 8;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        values[i] = identity < p.k && row + i < p.basis.d ? z_of(p, identity, row + i) : 0.f;
    uint4 three[3];
    split<Dtype::bf16>(values, three);
    uint4* const to = terms + (group * stages + stage) * I::kTerms * 32 + t;
#pragma unroll
    for (int term = 0; term < 3; ++term)
        to[I::tile(term, inner) * 32 + I::column(term, inner) * 4] = three[term];
    if (!TILES) to[I::column(3, inner) * 4] = make_uint4(0, 0, 0, 0);  // the tile's last columns
}

// A block's place in the launch: neighbours share rows of V, then lie beside each other in them.
struct Place {
    i64 part, block, group;
};

__device__ __forceinline__ Place place_of(const Plan& plan) {
    const i64 at = blockIdx.x / plan.groups;
    return {at / plan.blocks, at % plan.blocks, static_cast<i64>(blockIdx.x % plan.groups)};
}

template <Dtype T, int TILES>
__global__ void __launch_bounds__(32 * kWarps, T == Dtype::bf16 ? 3 : 2)
    tensor_kernel(ProjectParams p, Stored basis, Plan plan, const uint4* terms, float* out) {
    using I = Identities<TILES>;
    constexpr auto kReaders = Readers::columns_of_a_tile;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const Place at = place_of(plan);
    const i64 begin = at.part * plan.rows,
              column_0 = at.block * plan.columns + warp * kStepColumns<T>;
    if (column_0 >= p.basis.m) return;
    const i64 byte_0 = (at.block * kWarps + warp) * kRowBytes;
    const int stages = static_cast<int>(ceil_div(least(plan.rows, p.basis.d - begin), kStageRows));
    uint4* const slots = reinterpret_cast<uint4*>(shared_memory()) + warp * kStages * kSlot;
    const i64 all_stages = ceil_div(p.basis.d, kStageRows);
    terms += (at.group * all_stages + begin / kStageRows) * I::kTerms * 32 + lane;

    float acc[4 * kGroups<T>][I::kSums][4] = {};  // of 16 columns each
    for (int stage = 0, filled = 0; stage < stages; ++stage) {
        __syncwarp();  // all lanes have read the slot that is filled now
#pragma unroll 1
        for (; filled < stage + kStages; ++filled) {
            if (filled < stages)
                fill<kReaders, kStageRows, kStepChunks>(basis, slots + filled % kStages * kSlot,
                                                        begin + i64{filled} * kStageRows, byte_0,
                                                        lane);
            copies_commit();
        }
        uint4 b[I::kTerms];
#pragma unroll
        for (int i = 0; i < I::kTerms; ++i) b[i] = __ldg(terms + (stage * I::kTerms + i) * 32);
        copies_wait<kStages - 1>();
        __syncwarp();
        const uint4* const slot = slots + stage % kStages * kSlot;
        uint4 chunks[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            chunks[i] = slot[(t * 8 + i) * kStepChunks + place<kReaders>(t * 8 + i, g)];
#pragma unroll
        for (int group = 0; group < kGroups<T>; ++group) {
            std::uint32_t pairs[8][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) decode<T>(chunks[i], group, pairs[i]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float run[I::kSums][4] = {};
#pragma unroll
                for (int depth = 0; depth < 2; ++depth) {  // pairs of columns become pairs of rows
                    const int i = depth * 4;
                    const std::uint32_t a[4] = {
                        __byte_perm(pairs[i][j], pairs[i + 1][j], 0x5410),
                        __byte_perm(pairs[i][j], pairs[i + 1][j], 0x7632),
                        __byte_perm(pairs[i + 2][j], pairs[i + 3][j], 0x5410),
                        __byte_perm(pairs[i + 2][j], pairs[i + 3][j], 0x7632)};
                    I::multiply(run, a, b, depth);
                }
                I::add(acc[group * 4 + j], run);
            }
        }
    }

    out += at.part * p.k * p.basis.m;
#pragma unroll
    for (int tile = 0; tile < 4 * kGroups<T>; ++tile)
#pragma unroll
        for (int i = 0; i < I::kSums; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float sum = I::sum(acc[tile][i][j]);
                const i64 c =
                    column_0 + (g * kGroups<T> + tile / 4) * 8 + column<T>(tile % 4, j / 2);
                const i64 identity = at.group * I::kMost + i * 8 + 2 * t + j % 2;
                if (I::owns(t) && identity < p.k && c < p.basis.m)
                    out[identity * p.basis.m + c] = sum;
            }
}

// Four columns a lane; K identities share what is read of V.
template <int K>
__global__ void __launch_bounds__(32 * kWarps)
    f32_kernel(ProjectParams p, Plan plan, const float* z, bool vector, float* out) {
    const Place at = place_of(plan);
    const i64 column = at.block * plan.columns + threadIdx.x * 4, first = at.group * K;
    const i64 d = p.basis.d, m = p.basis.m;
    if (column >= m) return;
    const i64 begin = at.part * plan.rows, end = least(begin + plan.rows, d);
    const float* v = static_cast<const float*>(p.basis.rows) + begin * p.basis.stride + column;
    const float* zs[K];
#pragma unroll
    for (int i = 0; i < K; ++i) zs[i] = z + least(first + i, p.k - 1) * d;

    float acc[K][4] = {};
    const bool whole = vector && column + 4 <= m;
#pragma unroll(K == 1 ? 8 : 4)
    for (i64 row = begin; row < end; ++row, v += p.basis.stride) {
        float4 b_v;
        if (whole)
            b_v = __ldcs(reinterpret_cast<const float4*>(v));
        else
            b_v = make_float4(v[0], column + 1 < m ? v[1] : 0.f, column + 2 < m ? v[2] : 0.f,
                              column + 3 < m ? v[3] : 0.f);
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const float b_z = __ldg(zs[i] + row);
            acc[i][0] = fmaf(b_z, b_v.x, acc[i][0]), acc[i][1] = fmaf(b_z, b_v.y, acc[i][1]);
            acc[i][2] = fmaf(b_z, b_v.z, acc[i][2]), acc[i][3] = fmaf(b_z, b_v.w, acc[i][3]);
        }
    }
    out += at.part * p.k * m;
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (first + i < p.k && column + j < m) out[(first + i) * m + column + j] = acc[i][j];
}

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const float* sums, i64 parts, i64 n, float* out) {
    const i64 i = blockIdx.x * i64{kSumThreads} + threadIdx.x;
    if (i >= n) return;
    float sum = 0.f;
#pragma unroll 16
    for (i64 part = 0; part < parts; ++part) sum += __ldcs(sums + part * n + i);
    out[i] = sum;
}

template <Dtype T, int TILES>
void tensor(const ProjectParams& p, const Plan& plan, void* scratch, float* out, void* stream) {
    auto* terms = static_cast<uint4*>(scratch);
    const i64 units = plan.groups * plan.identities * ceil_div(p.basis.d, kStageRows) * 4;
    launch(kOp, z_terms_kernel<TILES>, ceil_div(units, 128), 128, 0, stream, p, terms, units);
    launch(kOp, tensor_kernel<T, TILES>, plan.parts * plan.blocks * plan.groups, 32 * kWarps,
           std::size_t{16} * kWarps * kStages * kSlot, stream, p, stored(p.basis), plan, terms,
           out);
}

template <int K>
void f32(const ProjectParams& p, const Plan& plan, void* scratch, float* out, void* stream) {
    auto* z = static_cast<float*>(scratch);
    const bool vector = aligned(p.basis.rows, 16) && (p.basis.d == 1 || p.basis.stride % 4 == 0);
    launch(kOp, z_f32_kernel, ceil_div(p.k * p.basis.d, 128), 128, 0, stream, p, z);
    launch(kOp, f32_kernel<K>, plan.parts * plan.blocks * plan.groups, 32 * kWarps, 0, stream, p,
           plan, z, vector, out);
}

template <Dtype T>
void by_identities(const ProjectParams& p, const Plan& plan, void* scratch, float* out,
                   void* stream) {
    if (p.basis.dtype == Dtype::f32) {
        if (plan.identities == 1) return f32<1>(p, plan, scratch, out, stream);
        if (plan.identities == 4) return f32<4>(p, plan, scratch, out, stream);
        return f32<16>(p, plan, scratch, out, stream);
    }
    if (plan.identities == 2) return tensor<T, 0>(p, plan, scratch, out, stream);
    return tensor<T, T == Dtype::u4 ? 1 : 2>(p, plan, scratch, out, stream);
}

}  // namespace

std::size_t project_scratch(const ProjectParams& p) {
    if (p.k <= 0 || p.basis.m <= 0 || p.basis.d <= 0) return 0;
    const Plan cut = plan(p);
    return cut.z + cut.sums;
}

void project(const ProjectParams& p, void* scratch, void* stream) {
    const i64 n = p.k * p.basis.m;
    if (n <= 0) return;
    const Plan cut = plan(p);
    float* sums = p.out;
    if (cut.parts > 1)
        sums = reinterpret_cast<float*>(static_cast<unsigned char*>(scratch) + cut.z);
    if (p.basis.d > 0) {
        if (p.basis.dtype == Dtype::i8)
            by_identities<Dtype::i8>(p, cut, scratch, sums, stream);
        else if (p.basis.dtype == Dtype::u4)
            by_identities<Dtype::u4>(p, cut, scratch, sums, stream);
        else
            by_identities<Dtype::bf16>(p, cut, scratch, sums, stream);
    }
    if (cut.parts > 1 || p.basis.d <= 0)
        launch(kOp, sum_kernel, ceil_div(n, kSumThreads), kSumThreads, 0, stream, sums,
               p.basis.d > 0 ? cut.parts : 0, n, p.out);
}

}  // namespace w2w::cuda
