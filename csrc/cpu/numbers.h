// The stored types of numbers as C++ types, and the step from a Dtype to one of them.
//
// For files compiled once per instruction set: W2W_ISA names the namespace.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace w2w::cpu::W2W_ISA {
namespace {

using std::int64_t;

struct bf16 {
    std::uint16_t bits;  // the upper half of an f32
};
struct f16 {
    std::uint16_t bits;
};
struct u4 {
    std::uint8_t bits;  // two numbers
};

// The address of column j of a row; j is even where two columns share a byte.
template <class T>
inline const T* column(const T* row, int64_t j) {
    return row + j;
}
inline const u4* column(const u4* row, int64_t j) { return row + j / 2; }

// How many columns a cache line of 64 bytes holds.
template <class T>
constexpr int kPerLine = 64 / sizeof(T);
template <>
constexpr int kPerLine<u4> = 128;

template <class F>
inline void with_real(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::bf16: f(bf16{}); break;
        case Dtype::f16: f(f16{}); break;
        default: f(float{});
    }
}

template <class F>
inline void with_basis(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::bf16: f(bf16{}); break;
        case Dtype::i8: f(std::int8_t{}); break;
        case Dtype::u4: f(u4{}); break;
        default: f(float{});
    }
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
