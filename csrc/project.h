// project: c = z V, with z of w, or of a gradient that reconstruct's backward is given:
//
//   divide     z = ((w - mean) / std) * row_scale     a coordinate of std 0 adds nothing, but a
//                                                     NaN or an infinity in it shows as NaN
//   otherwise  z = dL/dw * std * row_scale
//
// Deterministic: parts of d are summed apart, then added in one order.
#pragma once

#include <cstddef>

#include "basis.h"

namespace w2w {

struct ProjectParams {
    Basis basis;
    const void* source;  // w or dL/dw [k, d]: f32, bf16 or f16
    Dtype source_dtype;
    std::int64_t k, source_stride;
    bool divide;
    float* out;  // [k, m], contiguous
};

namespace cpu {
void project(const ProjectParams& p, int threads);
}  // namespace cpu

namespace cuda {
// Bytes of scratch that a call needs; the caller allocates, so that a graph can be captured.
std::size_t project_scratch(const ProjectParams& p);
void project(const ProjectParams& p, void* scratch, void* stream);
}  // namespace cuda

}  // namespace w2w
