// adapted_linear: the low-rank term of a Linear with one adapter a sample, and its gradients.
//
//   low_rank   s[b, t, r] = sum_i x[b, t, i] down[a, r, i]
//              y[b, t, n] = base[b, t, n] + scale_b * sum_r s[b, t, r] up[a, n, r]
//   outer      g[a, r, n] = sum over a's samples b of scale_b * sum_t coefficient[b, t, r] feature[b, t, n]
//
// Forward is low_rank with down = A, up = B. Backward of y's gradient g is low_rank with x = g,
// down = B^T, up = A^T (so s is u = g B, y is dx), then dA = outer(u, x) and dB^T = outer(s, g).
// a, the adapter of sample b, is index[b]; without an index b itself, or 0 where adapters = 1.
// An index outside of [0, adapters) is undefined: looking would make the caller wait for the GPU.
// Sums are f32; each result is rounded once. dW is never formed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace w2w {

struct LowRankParams {
    std::int64_t samples, tokens, in, out, rank, adapters;  // rank 1 to 16
    const void* base;  // [samples, tokens, out]; null: 0
    const void* x;     // [samples, tokens, in]
    void* y;           // [samples, tokens, out]; may be base; null: s alone is wanted
    Dtype dtype;       // of base, x and y: f32, bf16 or f16
    std::int64_t base_b, base_t, x_b, x_t, y_b, y_t;  // strides; the last dimension is contiguous
    const void* down;  // [adapters, rank, in] by these strides
    const void* up;    // [adapters, out, rank] by these strides
    Dtype adapter_dtype;
    std::int64_t down_a, down_r, down_i, up_a, up_n, up_r;
    const std::int64_t* index;  // [samples] or null
    const float* scales;        // [samples] or null: scale
    float scale;
    float* s;  // [samples, tokens, rank], contiguous
};

struct OuterParams {
    std::int64_t samples, tokens, width, rank, adapters;
    const float* coefficient;  // [samples, tokens, rank], contiguous
    const void* feature;       // [samples, tokens, width]
    Dtype dtype;
    std::int64_t feature_b, feature_t;
    const std::int64_t* index;
    const float* scales;
    float scale;
    void* out;  // [adapters, rank, width] by these strides
    Dtype out_dtype;
    std::int64_t out_a, out_r, out_n;
};

namespace cpu {
void low_rank(const LowRankParams& p, int threads);
void outer(const OuterParams& p, int threads);
}  // namespace cpu

namespace cuda {
void low_rank(const LowRankParams& p, void* stream);
std::size_t outer_scratch(const OuterParams& p);
void outer(const OuterParams& p, void* scratch, void* stream);
}  // namespace cuda

}  // namespace w2w
