// edit on the GPU: one read of w and delta, one write; 16 bytes a thread and row.
#include "../edit.h"

#include "numbers.cuh"

namespace w2w::cuda {
namespace {

constexpr const char* kOp = "edit";
constexpr int kThreads = 256;

template <Dtype T>
__global__ void __launch_bounds__(kThreads) edit_kernel(EditParams p, i64 blocks, bool vector) {
    const i64 row = blockIdx.x / blocks;
    const i64 i = (blockIdx.x % blocks * kThreads + threadIdx.x) * kChunk<T>;
    if (i >= p.d) return;
    const i64 count = least(kChunk<T>, p.d - i);
    const float amount = p.amounts ? p.amounts[row] : p.amount;
    float w[kChunk<T>];
    unpack<T>(load_chunk<T>(p.w, row * p.w_stride + i, count, vector), w);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j)
        if (j < count) w[j] = fmaf(amount, load_number(p.delta, p.delta_dtype, i + j), w[j]);
    store_chunk<T>(p.out, row * p.out_stride + i, count, vector, w);
}

}  // namespace

void edit(const EditParams& p, void* stream) {
    if (p.k <= 0 || p.d <= 0) return;
    with_dtype(p.dtype, [&](auto dtype) {
        constexpr Dtype kType = decltype(dtype)::value;
        constexpr i64 kNumbers = kChunk<kType>;
        const bool vector =
            aligned(p.w, 16) && aligned(p.out, 16) &&
            (p.k == 1 || (p.w_stride % kNumbers == 0 && p.out_stride % kNumbers == 0));
        const i64 blocks = ceil_div(p.d, kThreads * kNumbers);
        launch(kOp, edit_kernel<kType>, p.k * blocks, kThreads, 0, stream, p, blocks, vector);
    });
}

}  // namespace w2w::cuda
