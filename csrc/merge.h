// merge: W' = W + scale * (B A) for many modules in one call, always from the pristine W.
//
// The tensors of module i lie at distances (in bytes) from those of the first, in a table that a
// caller keeps for as long as the layout stays the same.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace w2w {

struct MergeModule {  // one row of the table: 8 x int64
    std::int64_t out_at, weight_at, a_at, b_at;  // bytes after the first module's
    std::int64_t out, in;                        // W [out, in], A [rank, in], B [out, rank]
    std::int64_t first_tile;  // tiles of 64 x 64 of all modules before this one
    std::int64_t unused;
};

inline constexpr std::int64_t kMergeTile = 64;

struct MergeParams {
    void* out;           // of the first module; never the pristine weights
    const void* weight;  // f32, bf16 or f16, as out
    const void* a;
    const void* b;
    Dtype dtype, adapter_dtype;
    const MergeModule* table;  // in the memory of the device that runs it
    std::int64_t modules, tiles, rank;
    float scale;
};

namespace cpu {
void merge(const MergeParams& p, int threads);
}  // namespace cpu

namespace cuda {
void merge(const MergeParams& p, void* stream);
}  // namespace cuda

}  // namespace w2w
