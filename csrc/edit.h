// edit: w' = w + amount * delta, on flattened adapters, with a delta computed beforehand.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace w2w {

struct EditParams {
    std::int64_t k, d;
    const void* w;  // [k, d]: f32, bf16 or f16
    Dtype dtype;    // of w and out
    std::int64_t w_stride;
    const void* delta;  // [d], f32, bf16 or f16
    Dtype delta_dtype;
    const float* amounts;  // [k] or null: amount
    float amount;
    void* out;  // [k, d]; may be w
    std::int64_t out_stride;
};

namespace cpu {
void edit(const EditParams& p, int threads);
}  // namespace cpu

namespace cuda {
void edit(const EditParams& p, void* stream);
}  // namespace cuda

}  // namespace w2w
