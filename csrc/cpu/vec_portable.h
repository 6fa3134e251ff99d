// vec.h for four lanes, what every 64-bit machine has (SSE2, NEON), in GCC's and Clang's vectors.
#pragma once

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int kWidth = 4;
constexpr int kDotRows = 3;     // of dot.h
constexpr int kSumColumns = 2;  // of contract.h

using Vec = float __attribute__((vector_size(16)));
using Bits = std::uint32_t __attribute__((vector_size(16)));
using Halves = std::uint16_t __attribute__((vector_size(8)));
using Bytes = std::int8_t __attribute__((vector_size(4)));

template <class To>
inline To read(const void* x) {
    To v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

inline Vec zero() { return Vec{}; }
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec fma(Vec a, Vec b, Vec sum) { return a * b + sum; }
inline float total(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline Vec choose(Bits mask, Vec yes, Vec no) {
    return reinterpret_cast<Vec>((mask & reinterpret_cast<Bits>(yes)) |
                                 (~mask & reinterpret_cast<Bits>(no)));
}
inline Vec zeros_to_inf(Vec x) {
    return choose(reinterpret_cast<Bits>(x == zero()), splat(__builtin_inff()), x);
}

inline Vec load(const float* x) { return read<Vec>(x); }
inline Vec load(const bf16* x) {
    return reinterpret_cast<Vec>(__builtin_convertvector(read<Halves>(x), Bits) << 16);
}
inline Vec load_way(const bf16* x, Way<0>) { return reinterpret_cast<Vec>(read<Bits>(x) << 16); }
inline Vec load_way(const bf16* x, Way<1>) {
    return reinterpret_cast<Vec>(read<Bits>(x) & 0xffff0000);
}
inline Vec load(const f16* x) {
    const Bits half = __builtin_convertvector(read<Halves>(x), Bits);
    // The bits in place as an f32's are the number times 2^-112, subnormal or not.
    const Bits magnitude = (half & 0x7fff) << 13;
    const Bits scaled = reinterpret_cast<Bits>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
    const Bits special = reinterpret_cast<Bits>((half & 0x7c00) == 0x7c00);
    return reinterpret_cast<Vec>((half & 0x8000) << 16 | scaled | (special & 0x7f800000));
}
inline Vec load(const std::int8_t* x) { return __builtin_convertvector(read<Bytes>(x), Vec); }
inline Vec load(const u4* x) {
    const std::uint32_t a = x[0].bits, b = x[1].bits;
    const Bits numbers = {a & 15, a >> 4, b & 15, b >> 4};
    using Ints = std::int32_t __attribute__((vector_size(16)));
    return __builtin_convertvector(reinterpret_cast<Ints>(numbers) - 8, Vec);
}

inline void store(float* out, Vec x) { std::memcpy(out, &x, sizeof x); }
inline void put(void* out, Bits low) {
    const Halves halves = __builtin_convertvector(low, Halves);
    std::memcpy(out, &halves, sizeof halves);
}
inline Bits round_high(Vec x) {  // to bf16, in the upper half of the bits
    const Bits bits = reinterpret_cast<Bits>(x);
    const Bits number = reinterpret_cast<Bits>(x == x);
    return bits + (number & (0x7fff + ((bits >> 16) & 1)));
}
inline void store(bf16* out, Vec x) { put(out, round_high(x) >> 16); }
inline void store_ways(bf16* out, const Vec (&x)[2]) {
    const Bits both = round_high(x[0]) >> 16 | (round_high(x[1]) & 0xffff0000);
    std::memcpy(out, &both, sizeof both);
}
inline void store(f16* out, Vec x) {
    const Bits bits = reinterpret_cast<Bits>(x), magnitude = bits & 0x7fffffff;
    const Bits nan = reinterpret_cast<Bits>(x != x);
    const Bits small = reinterpret_cast<Bits>(magnitude < 0x38800000);  // under 2^-14
    const Bits large = reinterpret_cast<Bits>(magnitude >= 0x477ff000);  // rounds to infinity
    // One half has an f16 subnormal's last place: adding it rounds there.
    const Bits subnormal =
        reinterpret_cast<Bits>(reinterpret_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
    const Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    Bits half = (small & subnormal) | (~small & normal);
    half = (large & 0x7c00) | (~large & half);
    half = (nan & 0x7e00) | (~nan & half);
    put(out, half | (bits >> 16 & 0x8000));
}

inline void stream_ways(bf16* out, const Vec (&x)[2]) { store_ways(out, x); }
template <class T>
inline void stream_ways(T* out, const Vec (&x)[1]) {
    store(out, x[0]);
}
inline void stream_end() {}

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
