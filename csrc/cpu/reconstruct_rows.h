// What cpu/reconstruct.cpp offers to cpu/dispatch.cpp, once per instruction set.
#pragma once

#include "../reconstruct.h"

namespace w2w::cpu {

// Rows are worked on a tile at a time: sums[kTile * k] is the caller's scratch for one tile.
// 32 rows of one chunk are 64 KB in bf16: they wait in L2 while every identity passes.
inline constexpr std::int64_t kTile = 32;

using RowsFn = void (*)(const ReconstructParams& p, std::int64_t begin, std::int64_t end,
                        float* sums);

namespace portable {
void reconstruct_rows(const ReconstructParams&, std::int64_t, std::int64_t, float*);
}
namespace avx2 {
void reconstruct_rows(const ReconstructParams&, std::int64_t, std::int64_t, float*);
}
namespace avx512 {
void reconstruct_rows(const ReconstructParams&, std::int64_t, std::int64_t, float*);
}

}  // namespace w2w::cpu
