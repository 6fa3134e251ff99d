// reconstruct: w = mean + std * (c V^T), for k identities in one pass over the basis V.
//
//   c [k, m] f32    V [d, m] f32 or bf16    mean, std [d] f32    w [k, d] f32 or bf16
//
// Nothing here knows Python or torch: raw pointers, sizes, and strides counted in elements.
// Rows are contiguous; ldc, ldb and ldo are the distances between rows of c, V and w.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace w2w {

enum class Dtype : int { f32 = 0, bf16 = 1 };

struct ReconstructParams {
    const float* c;
    std::int64_t k, m, ldc;
    const void* basis;
    Dtype basis_dtype;
    std::int64_t d, ldb;
    const float* mean;
    const float* std;
    void* out;
    Dtype out_dtype;
    std::int64_t ldo;
};

namespace cpu {

// Sums in f32; rounds once to out_dtype. The result does not depend on `threads`.
void reconstruct(const ReconstructParams& p, int threads);

// Instruction sets, best first: what was built, what this machine can run, what is in use.
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument; for tests

}  // namespace cpu
}  // namespace w2w
