// What reconstruct and project know of a space: w = mean + std * row_scale * (c V^T).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace w2w {

struct Basis {
    const void* rows;        // V [d, m]: f32, bf16, i8 or u4
    Dtype dtype;
    std::int64_t d, m;
    std::int64_t stride;     // between rows, in stored elements: numbers, or bytes of u4
    const float* mean;       // [d]; null: 0
    const float* std;        // [d]
    const float* row_scale;  // [d], the scale of an integer row; null: 1
};

}  // namespace w2w
