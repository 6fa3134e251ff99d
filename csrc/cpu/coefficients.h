// reconstruct's rows of c, each in the form in which V's numbers are multiplied with it. A row's
// form follows from it alone, so that its result does not depend on what else is in the batch.
#pragma once

#include "dot.h"
#include "work.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// Whether this instruction set multiplies T as it is stored: dot_stored.h.
template <class T>
constexpr bool kStored = false;

template <class T, bool stored = kStored<T>>
struct Coefficients {  // f32, companions of V's numbers
    const int64_t k, m;
    const Floats wide;

    Coefficients(const float* c, int64_t stride, int64_t k, int64_t m) : k(k), m(m), wide(k * m) {
        for (int64_t i = 0; i < k; ++i) pack<T>(c + i * stride, 1, m, wide + i * m);
    }

    // sums[i * rows + r] += <V[r], c[i]>
    void multiply(const T* v, int64_t v_stride, int64_t rows, float* sums) const {
        multiply(v, v_stride, rows, 0, k, sums);
    }
    // The same for c[first + i], i < n.
    void multiply(const T* v, int64_t v_stride, int64_t rows, int64_t first, int64_t n,
                  float* sums) const {
        dot(v, v_stride, rows, wide + first * m, m, n, m, Sums{sums, 1, rows});
    }
};

}  // namespace
}  // namespace w2w::cpu::W2W_ISA

#if defined(__AVX512VNNI__)
#include "dot_stored.h"
#endif
