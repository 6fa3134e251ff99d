// vec.h for eight lanes: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int kWidth = 8;
constexpr int kDotRows = 3;     // of dot.h: 3 x 4 sums, 3 rows and a coefficient: 16 registers
constexpr int kSumColumns = 2;  // of contract.h: 6 x 2 sums, 2 columns and a factor: 15 registers

using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Vec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Vec zeros_to_inf(Vec x) {
    const Vec is_zero = _mm256_cmp_ps(x, zero(), _CMP_EQ_OQ);
    return _mm256_blendv_ps(x, splat(__builtin_inff()), is_zero);
}

inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
inline Vec load(const bf16* x) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load_way(const bf16* x, Way<0>) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
}
inline Vec load_way(const bf16* x, Way<1>) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
}
inline Vec load(const f16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Vec load(const std::int8_t* x) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline Vec load(const u4* x) {
    std::int32_t eight;
    std::memcpy(&eight, x, sizeof eight);
    const __m256i places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i moved = _mm256_srlv_epi32(_mm256_set1_epi32(eight), places);
    const __m256i numbers = _mm256_and_si256(moved, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(numbers, _mm256_set1_epi32(8)));
}

inline __m256i round_high(Vec x) {  // to bf16, in the upper half of the bits
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_add_epi32(bits, _mm256_andnot_si256(nan, half));
}
inline __m128i round_to(const bf16*, Vec x) {
    const __m256i low = _mm256_srli_epi32(round_high(x), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}
inline __m256i round_ways(const Vec (&x)[2]) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_high(x[0]), 16), round_high(x[1]), 0xaa);
}
inline __m128i round_to(const f16*, Vec x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* out, Vec x) { _mm256_storeu_ps(out, x); }
template <class Half>
inline void store(Half* out, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), round_to(out, x));
}
inline void store_ways(bf16* out, const Vec (&x)[2]) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round_ways(x));
}
inline void stream_ways(float* out, const Vec (&x)[1]) { _mm256_stream_ps(out, x[0]); }
inline void stream_ways(f16* out, const Vec (&x)[1]) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), round_to(out, x[0]));
}
inline void stream_ways(bf16* out, const Vec (&x)[2]) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), round_ways(x));
}
inline void stream_end() { _mm_sfence(); }

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
