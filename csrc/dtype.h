// The types of numbers that kernels read and write; the codes are the interface to Python.
#pragma once

#include <cstdint>

namespace w2w {

enum class Dtype : int {
    f32 = 0,
    bf16 = 1,
    f16 = 2,
    i8 = 3,  // of a basis only: times row_scale of its row
    u4 = 4,  // of a basis only: two a byte, the even column in the low half, minus 8; the last
             // byte of an odd row has an unused high half
};

}  // namespace w2w
