// vec.h for sixteen lanes: AVX-512 F, BW and VL.
#pragma once

#include <immintrin.h>

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int kWidth = 16;
constexpr int kDotRows = 6;     // of dot.h: 6 x 4 sums, 6 rows and a coefficient: 31 registers
constexpr int kSumColumns = 4;  // of contract.h: 6 x 4 sums, 4 columns and a factor: 29 registers

using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Vec x) { return _mm512_reduce_add_ps(x); }
inline Vec zeros_to_inf(Vec x) {
    const __mmask16 is_zero = _mm512_cmp_ps_mask(x, zero(), _CMP_EQ_OQ);
    return _mm512_mask_blend_ps(is_zero, x, splat(__builtin_inff()));
}
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec widen(const bf16*, __m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vec widen(const f16*, __m256i x) { return _mm512_cvtph_ps(x); }
inline Vec widen(const std::int8_t*, __m128i x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}
inline Vec widen(const u4*, __m128i x) {  // of the lower eight bytes
    const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i places =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i bytes = _mm512_permutexvar_epi32(half, _mm512_castsi128_si512(x));
    // A permutation looks at four bits of an index: the table needs no mask.
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, places), values);
}

inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline Vec load(const std::int8_t* x) {
    return widen(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Vec load(const u4* x) {
    return widen(x, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
}
template <class Half>
inline Vec load(const Half* x) {
    return widen(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Vec load_way(const bf16* x, Way<0>) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(x), 16));
}
inline Vec load_way(const bf16* x, Way<1>) {
    return _mm512_castsi512_ps(_mm512_and_epi32(_mm512_loadu_si512(x), _mm512_set1_epi32(-65536)));
}
inline Vec load_first(const float* x, int n) { return _mm512_maskz_loadu_ps(first(n), x); }
inline Vec load_first(const std::int8_t* x, int n) {
    return widen(x, _mm_maskz_loadu_epi8(first(n), x));
}
inline Vec load_first(const u4* x, int n) {
    return widen(x, _mm_maskz_loadu_epi8(first((n + 1) / 2), x));
}
template <class Half>
inline Vec load_first(const Half* x, int n) {
    return widen(x, _mm256_maskz_loadu_epi16(first(n), x));
}

inline __m512i round_high(Vec x) {  // to bf16, in the upper half of the bits
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    return _mm512_mask_add_epi32(bits, number, bits, half);
}
inline __m256i round_to(const bf16*, Vec x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_high(x), 16));
}
inline __m512i round_ways(const Vec (&x)[2]) {
    const __m512i low = _mm512_srli_epi32(round_high(x[0]), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, round_high(x[1]));
}
inline __m256i round_to(const f16*, Vec x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* out, Vec x) { _mm512_storeu_ps(out, x); }
template <class Half>
inline void store(Half* out, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round_to(out, x));
}
inline void store_first(float* out, Vec x, int n) { _mm512_mask_storeu_ps(out, first(n), x); }
template <class Half>
inline void store_first(Half* out, Vec x, int n) {
    _mm256_mask_storeu_epi16(out, first(n), round_to(out, x));
}
inline void store_ways(bf16* out, const Vec (&x)[2]) { _mm512_storeu_si512(out, round_ways(x)); }
inline void stream_ways(float* out, const Vec (&x)[1]) { _mm512_stream_ps(out, x[0]); }
inline void stream_ways(f16* out, const Vec (&x)[1]) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), round_to(out, x[0]));
}
inline void stream_ways(bf16* out, const Vec (&x)[2]) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), round_ways(x));
}
inline void stream_end() { _mm_sfence(); }

}  // namespace
}  // namespace w2w::cpu::W2W_ISA
