// The AVX-512 that the kernels use, lane by lane: enough to run csrc/cpu's avx512 sets, unchanged,
// on any machine. Masked loads and stores touch what the mask says and nothing else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define W2W_VECTOR(type, bytes) type __attribute__((vector_size(bytes)))
typedef W2W_VECTOR(float, 64) __m512;
typedef W2W_VECTOR(short, 64) __m512bh;
typedef W2W_VECTOR(long long, 64) __m512i;
typedef W2W_VECTOR(long long, 32) __m256i;
typedef W2W_VECTOR(long long, 16) __m128i;
using __mmask16 = std::uint16_t;
using __mmask64 = std::uint64_t;

enum { _CMP_EQ_OQ, _CMP_ORD_Q, _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };

namespace emulator {

using i8 = std::int8_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using i32 = std::int32_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;

template <class T, class V>
struct Lanes {
    static constexpr int count = sizeof(V) / sizeof(T);
    T at[count];
    Lanes() = default;
    Lanes(V v) { std::memcpy(at, &v, sizeof v); }
    T operator[](int i) const { return at[i]; }
};

// V of T's, lane(i) each.
template <class T, class V, class Lane>
inline V make(const Lane& lane) {
    Lanes<T, V> x;
    for (int i = 0; i < x.count; ++i) x.at[i] = static_cast<T>(lane(i));
    V v;
    std::memcpy(&v, x.at, sizeof v);
    return v;
}

template <class V>
inline V read(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
inline void write(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}
template <class T, class V, class Mask>
inline V read_some(Mask mask, const void* from) {
    return make<T, V>([&](int i) {
        return mask >> i & 1 ? read<T>(static_cast<const T*>(from) + i) : T{};
    });
}
template <class T, class V, class Mask>
inline void write_some(void* to, Mask mask, V v) {
    for (int i = 0; i < Lanes<T, V>::count; ++i)
        if (mask >> i & 1) write<T>(static_cast<T*>(to) + i, Lanes<T, V>(v)[i]);
}
// A store past the caches wants an address of its own size.
template <class V>
inline void write_aligned(void* to, V v) {
    if (reinterpret_cast<std::uintptr_t>(to) % sizeof v) std::abort();
    write(to, v);
}

inline float widen(u16 half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    float size = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(fraction, -24);
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    return half >> 15 ? -size : size;
}
inline u16 narrow(float x) {  // to nearest even
    const int sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return static_cast<u16>(sign | 0x7e00);
    if (std::isinf(x)) return static_cast<u16>(sign | 0x7c00);
    int exponent;
    std::frexp(x, &exponent);
    if (exponent < -13 || x == 0) exponent = -13;  // subnormal
    // A fraction that rounds up to the next power of two carries into the exponent.
    const double fraction = std::nearbyint(std::ldexp(std::fabs(double{x}), 11 - exponent));
    const int size = (exponent + 13) * 1024 + static_cast<int>(fraction);
    return static_cast<u16>(sign | (size < 0x7c00 ? size : 0x7c00));
}

// vdpbf16ps takes subnormal numbers for zeros, those it is given and those it makes.
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float from_bf16(u16 bits) {
    const u32 word = u32{bits} << 16;
    return flush(read<float>(&word));
}

}  // namespace emulator

// --- f32 ----------------------------------------------------------------------------------------

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_set1_ps(float x) { return __m512{} + x; }
template <class... Floats>
inline __m512 _mm512_setr_ps(Floats... x) {
    return __m512{static_cast<float>(x)...};
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    __m512 sum;
    for (int i = 0; i < 16; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return sum;
}
inline float _mm512_reduce_add_ps(__m512 x) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    int mask = 0;
    for (int i = 0; i < 16; ++i)
        mask |= (how == _CMP_EQ_OQ ? a[i] == b[i] : !std::isunordered(a[i], b[i])) << i;
    return static_cast<__mmask16>(mask);
}
inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
    return emulator::make<float, __m512>([&](int i) { return mask >> i & 1 ? b[i] : a[i]; });
}
inline __m512 _mm512_castsi512_ps(__m512i x) { return reinterpret_cast<__m512>(x); }
inline __m512i _mm512_castps_si512(__m512 x) { return reinterpret_cast<__m512i>(x); }
inline __m512 _mm512_cvtepi32_ps(__m512i x) {
    const emulator::Lanes<emulator::i32, __m512i> lanes = x;
    return emulator::make<float, __m512>([&](int i) { return static_cast<float>(lanes[i]); });
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
    const emulator::Lanes<emulator::u16, __m256i> lanes = x;
    return emulator::make<float, __m512>([&](int i) { return emulator::widen(lanes[i]); });
}
inline __m256i _mm512_cvtps_ph(__m512 x, int) {
    return emulator::make<emulator::u16, __m256i>([&](int i) { return emulator::narrow(x[i]); });
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 x) {
    const emulator::Lanes<emulator::i32, __m512i> at = index;
    return emulator::make<float, __m512>([&](int i) { return x[at[i] & 15]; });
}

// --- integers -----------------------------------------------------------------------------------

#define W2W_EACH(name, type, vector, expression)                                        \
    inline vector name(vector a, vector b) {                                            \
        const emulator::Lanes<emulator::type, vector> x = a, y = b;                     \
        return emulator::make<emulator::type, vector>([&](int i) { return expression; }); \
    }
W2W_EACH(_mm512_add_epi32, u32, __m512i, x[i] + y[i])
W2W_EACH(_mm512_srlv_epi32, u32, __m512i, y[i] < 32 ? x[i] >> y[i] : 0)
W2W_EACH(_mm512_permutexvar_epi32, u32, __m512i, y[static_cast<int>(x[i] & 15)])
#undef W2W_EACH
#define W2W_SHIFT(name, type, shift)                                                      \
    inline __m512i name(__m512i a, unsigned count) {                                      \
        const emulator::Lanes<emulator::type, __m512i> x = a;                             \
        return emulator::make<emulator::type, __m512i>([&](int i) { return x[i] shift count; }); \
    }
W2W_SHIFT(_mm512_slli_epi32, u32, <<)
W2W_SHIFT(_mm512_srli_epi32, u32, >>)
W2W_SHIFT(_mm512_srli_epi16, u16, >>)
#undef W2W_SHIFT
inline __m512i _mm512_slli_epi64(__m512i a, unsigned count) { return a << count; }
inline __m512i _mm512_add_epi64(__m512i a, __m512i b) { return a + b; }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_and_epi32(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i _mm512_set1_epi8(char x) {
    return emulator::make<emulator::i8, __m512i>([&](int) { return x; });
}
inline __m512i _mm512_set1_epi32(int x) {
    return emulator::make<emulator::i32, __m512i>([&](int) { return x; });
}
template <class... Ints>
inline __m512i _mm512_setr_epi32(Ints... x) {
    const int all[] = {x...};
    return emulator::read<__m512i>(all);
}
inline __m512i _mm512_mask_add_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
    const emulator::Lanes<emulator::u32, __m512i> x = other, sum = _mm512_add_epi32(a, b);
    return emulator::make<emulator::u32, __m512i>(
        [&](int i) { return mask >> i & 1 ? sum[i] : x[i]; });
}
inline __m512i _mm512_mask_blend_epi16(std::uint32_t mask, __m512i a, __m512i b) {
    const emulator::Lanes<emulator::u16, __m512i> x = a, y = b;
    return emulator::make<emulator::u16, __m512i>(
        [&](int i) { return mask >> i & 1 ? y[i] : x[i]; });
}
#define W2W_CONVERT(name, from, from_vector, to, to_vector)                                 \
    inline to_vector name(from_vector a) {                                                  \
        const emulator::Lanes<emulator::from, from_vector> x = a;                           \
        return emulator::make<emulator::to, to_vector>([&](int i) { return x[i]; });        \
    }
W2W_CONVERT(_mm512_cvtepu16_epi32, u16, __m256i, u32, __m512i)
W2W_CONVERT(_mm512_cvtepi8_epi32, i8, __m128i, i32, __m512i)
W2W_CONVERT(_mm512_cvtepi32_epi16, u32, __m512i, u16, __m256i)
W2W_CONVERT(_mm512_cvtepi32_epi64, i32, __m256i, i64, __m512i)
#undef W2W_CONVERT
inline __m512i _mm512_castsi128_si512(__m128i x) {  // what is above is undefined
    return __m512i{x[0], x[1], -1, -1, -1, -1, -1, -1};
}
inline __m256i _mm512_castsi512_si256(__m512i x) { return __m256i{x[0], x[1], x[2], x[3]}; }
inline __m256i _mm512_extracti64x4_epi64(__m512i x, int upper) {
    return upper ? __m256i{x[4], x[5], x[6], x[7]} : _mm512_castsi512_si256(x);
}
inline long long _mm512_reduce_add_epi64(__m512i x) {
    return x[0] + x[1] + x[2] + x[3] + x[4] + x[5] + x[6] + x[7];
}

// --- products of stored numbers -----------------------------------------------------------------

inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    const emulator::Lanes<emulator::i32, __m512i> sum = sums;
    const emulator::Lanes<emulator::u8, __m512i> x = a;
    const emulator::Lanes<emulator::i8, __m512i> y = b;
    return emulator::make<emulator::i32, __m512i>([&](int i) {
        emulator::i64 all = sum[i];
        for (int j = 4 * i; j < 4 * i + 4; ++j) all += x[j] * y[j];
        if (all != static_cast<emulator::i32>(all)) std::abort();  // it would wrap around
        return all;
    });
}
inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    const emulator::Lanes<emulator::u16, __m512bh> x = a, y = b;
    return emulator::make<float, __m512>([&](int i) {
        float sum = emulator::flush(sums[i]);
        for (int j = 2 * i + 1; j >= 2 * i; --j) {
            const float left = emulator::from_bf16(x[j]), right = emulator::from_bf16(y[j]);
            sum = emulator::flush(__builtin_fmaf(left, right, sum));
        }
        return sum;
    });
}

// --- memory -------------------------------------------------------------------------------------

inline __m512 _mm512_loadu_ps(const void* x) { return emulator::read<__m512>(x); }
inline __m512i _mm512_loadu_si512(const void* x) { return emulator::read<__m512i>(x); }
inline __m256i _mm256_loadu_si256(const __m256i* x) { return emulator::read<__m256i>(x); }
inline __m128i _mm_loadu_si128(const __m128i* x) { return emulator::read<__m128i>(x); }
inline __m128i _mm_loadl_epi64(const __m128i* x) {
    return __m128i{emulator::read<long long>(x), 0};
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* x) {
    return emulator::read_some<float, __m512>(mask, x);
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* x) {
    return emulator::read_some<emulator::u8, __m512i>(mask, x);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* x) {
    return emulator::read_some<emulator::u16, __m256i>(mask, x);
}
inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* x) {
    return emulator::read_some<emulator::u8, __m128i>(mask, x);
}
inline void _mm512_storeu_ps(void* to, __m512 x) { emulator::write(to, x); }
inline void _mm512_storeu_si512(void* to, __m512i x) { emulator::write(to, x); }
inline void _mm256_storeu_si256(__m256i* to, __m256i x) { emulator::write<__m256i>(to, x); }
inline void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) {
    emulator::write_some<float>(to, mask, x);
}
inline void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i x) {
    emulator::write_some<emulator::u16>(to, mask, x);
}
inline void _mm512_stream_ps(void* to, __m512 x) { emulator::write_aligned(to, x); }
inline void _mm512_stream_si512(void* to, __m512i x) { emulator::write_aligned(to, x); }
inline void _mm256_stream_si256(__m256i* to, __m256i x) {
    emulator::write_aligned<__m256i>(to, x);
}
inline void _mm_sfence() {}
