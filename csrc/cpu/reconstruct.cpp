// Rows [begin, end) of reconstruct. Compiled once per instruction set: W2W_ISA names the
// namespace, the flags come from CMakeLists.txt, cpu/dispatch.cpp chooses at run time.
//
// No standard-library template may be used here: the linker keeps one copy of an inline
// function, and the copy made with AVX-512 flags must not reach an older machine.
#include <cstdint>
#include <cstring>

#include "reconstruct_rows.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace w2w::cpu::W2W_ISA {
namespace {

using std::int64_t;
using bf16 = std::uint16_t;  // the upper half of an f32

#if defined(__AVX512F__)

constexpr int kWidth = 16;
constexpr int kRows = 4;
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vec load(const float* x) { return _mm512_loadu_ps(x); }
inline Vec load(const bf16* x) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Vec load_first(const float* x, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), x);
}
inline Vec load_first(const bf16* x, int n) {
    return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), x));
}
inline Vec fma(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float total(Vec x) { return _mm512_reduce_add_ps(x); }

#else

#if defined(__AVX2__)

constexpr int kWidth = 8;
constexpr int kRows = 2;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* x) { return _mm256_loadu_ps(x); }
inline Vec load(const bf16* x) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec fma(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float total(Vec x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#else

// Four lanes, what every 64-bit machine has (SSE2, NEON), in the vector types of GCC and Clang.
constexpr int kWidth = 4;
constexpr int kRows = 2;
using Vec = float __attribute__((vector_size(16)));

inline Vec zero() { return Vec{}; }
inline Vec load(const float* x) {
    Vec v;
    std::memcpy(&v, x, sizeof v);
    return v;
}
inline Vec load(const bf16* x) {
    using Half = bf16 __attribute__((vector_size(8)));
    using Bits = std::uint32_t __attribute__((vector_size(16)));
    Half half;
    std::memcpy(&half, x, sizeof half);
    const Bits bits = __builtin_convertvector(half, Bits) << 16;
    Vec v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
inline Vec fma(Vec a, Vec b, Vec sum) { return a * b + sum; }
inline float total(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

#endif

template <class T>
inline Vec load_first(const T* x, int n) {  // never reads past x[n - 1]
    T padded[kWidth] = {};
    std::memcpy(padded, x, static_cast<std::size_t>(n) * sizeof(T));
    return load(padded);
}

#endif

// 1024 columns of c are 4 KB an identity: four identities stay in L1 while a tile passes.
// Short sums are also the accurate ones: at most 1024 / kWidth additions follow each other.
constexpr int64_t kChunk = 1024;
constexpr int kIdentities = 4;

// sums[r * k + i] += <V[r], c[i]> over n <= kChunk columns, for R rows and K identities held in
// registers. Each pair has its own accumulator and order of additions, whatever R and K are, so
// neither tails nor threads change a bit of the result.
template <int R, int K, class T>
inline void dot_block(const T* v, int64_t ldb, const float* c, int64_t ldc, int64_t n,
                      float* sums, int64_t k) {
    Vec acc[R][K];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < K; ++i) acc[r][i] = zero();

    const auto step = [&](auto read, int64_t j) {
        Vec row[R];
        for (int r = 0; r < R; ++r) {
            row[r] = read(v + r * ldb + j);
            // Several short rows at once look random to the hardware's prefetcher: ask for the
            // block after next, into L2. A prefetch beyond the basis is not an access.
            __builtin_prefetch(v + (r + 2 * R) * ldb + j, 0, 2);
        }
        for (int i = 0; i < K; ++i) {
            const Vec coefficient = read(c + i * ldc + j);
            for (int r = 0; r < R; ++r) acc[r][i] = fma(row[r], coefficient, acc[r][i]);
        }
    };
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) step([](auto* x) { return load(x); }, j);
    if (j < n) {
        const int rest = static_cast<int>(n - j);
        step([rest](auto* x) { return load_first(x, rest); }, j);
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < K; ++i) sums[r * k + i] += total(acc[r][i]);
}

template <int K, class T>
inline void dot_rows(const T* v, int64_t ldb, int64_t rows, const float* c, int64_t ldc, int64_t n,
                     float* sums, int64_t k) {
    // One identity leaves registers for more rows: enough chains to hide the latency of fma.
    constexpr int R = K == 1 ? 2 * kRows : kRows;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        dot_block<R, K>(v + r * ldb, ldb, c, ldc, n, sums + r * k, k);
    for (; r < rows; ++r) dot_block<1, K>(v + r * ldb, ldb, c, ldc, n, sums + r * k, k);
}

inline void store(float* out, float x) { *out = x; }
inline void store(bf16* out, float x) {  // nearest, ties to even; a NaN stays one
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    *out = static_cast<bf16>(nan ? (bits >> 16) | 0x40u
                                 : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class Out>
inline void epilogue(const ReconstructParams& p, int64_t first, int64_t rows, const float* sums) {
    Out* out = static_cast<Out*>(p.out) + first;
    for (int64_t i = 0; i < p.k; ++i)
        for (int64_t r = 0; r < rows; ++r)
            store(out + i * p.ldo + r, p.mean[first + r] + p.std[first + r] * sums[r * p.k + i]);
}

template <class T>
inline void all_rows(const ReconstructParams& p, int64_t begin, int64_t end, float* sums) {
    // One group of identities has nothing to come back for: it reads its rows from end to end.
    const int64_t tile = p.k <= kIdentities ? 2 * kRows : kTile;
    for (int64_t first = begin; first < end; first += tile) {
        const int64_t rows = end - first < tile ? end - first : tile;
        std::memset(sums, 0, static_cast<std::size_t>(rows * p.k) * sizeof(float));
        for (int64_t j = 0; j < p.m; j += kChunk) {
            const int64_t n = p.m - j < kChunk ? p.m - j : kChunk;
            const T* v = static_cast<const T*>(p.basis) + first * p.ldb + j;
            for (int64_t i = 0; i < p.k; i += kIdentities) {
                const float* c = p.c + i * p.ldc + j;
                switch (p.k - i) {
                    case 1: dot_rows<1>(v, p.ldb, rows, c, p.ldc, n, sums + i, p.k); break;
                    case 2: dot_rows<2>(v, p.ldb, rows, c, p.ldc, n, sums + i, p.k); break;
                    case 3: dot_rows<3>(v, p.ldb, rows, c, p.ldc, n, sums + i, p.k); break;
                    default: dot_rows<4>(v, p.ldb, rows, c, p.ldc, n, sums + i, p.k);
                }
            }
        }
        if (p.out_dtype == Dtype::f32)
            epilogue<float>(p, first, rows, sums);
        else
            epilogue<bf16>(p, first, rows, sums);
    }
}

}  // namespace

void reconstruct_rows(const ReconstructParams& p, int64_t begin, int64_t end, float* sums) {
    if (p.basis_dtype == Dtype::f32)
        all_rows<float>(p, begin, end, sums);
    else
        all_rows<bf16>(p, begin, end, sums);
}

}  // namespace w2w::cpu::W2W_ISA
