// reconstruct: w = mean + (std * row_scale) * (c V^T), for k identities in one pass over V.
//
// Nothing here knows Python or torch: raw pointers, sizes, and strides counted in elements. Rows
// are contiguous. Sums are f32; each result is rounded once, to nearest even.
#pragma once

#include "basis.h"

namespace w2w {

struct ReconstructParams {
    Basis basis;
    const float* c;  // [k, m]
    std::int64_t k, c_stride;
    void* out;  // [k, d]: f32, bf16 or f16
    Dtype out_dtype;
    std::int64_t out_stride;
};

namespace cpu {
// The result depends neither on `threads` nor on what else is in the batch.
void reconstruct(const ReconstructParams& p, int threads);
}  // namespace cpu

namespace cuda {
void reconstruct(const ReconstructParams& p, void* stream);
}  // namespace cuda

}  // namespace w2w
