// parallel.h as the kernels use it: a lambda a piece, and memory that releases itself.
#pragma once

#include "numbers.h"
#include "parallel.h"

namespace w2w::cpu::W2W_ISA {
namespace {

template <class Work>
inline void for_pieces(int64_t pieces, int64_t workers, const Work& work) {
    in_parallel(
        pieces, workers,
        [](const void* context, int64_t piece, int64_t worker) {
            (*static_cast<const Work*>(context))(piece, worker);
        },
        &work);
}

class Floats {
public:
    explicit Floats(int64_t count)
        : data_(static_cast<float*>(allocate(static_cast<std::size_t>(count) * sizeof(float)))) {}
    ~Floats() { release(data_); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    operator float*() const { return data_; }

private:
    float* data_;
};

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
