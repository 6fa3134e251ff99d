// project: parts of d are summed apart, then added in one order. Compiled once per instruction
// set. The parts follow from the basis alone, never from threads or from the batch.
#include "../project.h"

#include "contract.h"
#include "work.h"

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int64_t kTile = 2 * kGroup;  // rows that wait in L2 while the identities pass
constexpr int64_t kChunk = 1024;       // columns, the same
constexpr int64_t kBlock = 16;         // identities a pass over V: what keeps the parts small
constexpr int64_t kMostParts = 64;
constexpr int64_t kNumbersPerPart = 1 << 18;

// z[i, r] of rows [first, first + rows), in rows of kTile.
template <class Source>
inline void factors(const ProjectParams& p, int64_t i0, int64_t k, int64_t first, int64_t rows,
                    float* z) {
    const Basis& basis = p.basis;
    const Source* source = static_cast<const Source*>(p.source) + i0 * p.source_stride + first;
    by_vectors(rows, [&](int64_t r, const auto& load, const auto& store) {
        const Vec std = load(basis.std + first + r);
        const Vec scale = basis.row_scale ? load(basis.row_scale + first + r) : splat(1);
        const Vec mean = basis.mean && p.divide ? load(basis.mean + first + r) : zero();
        // x / inf is 0 for every finite x, and a NaN or an infinity still shows.
        const Vec divisor = zeros_to_inf(std), gain = std * scale;
        for (int64_t i = 0; i < k; ++i) {
            const Vec x = load(source + i * p.source_stride + r);
            store(z + i * kTile + r, p.divide ? (x - mean) / divisor * scale : x * gain);
        }
    });
}

// The sums of rows [begin, end) and columns [j, j + n) for identities [i0, i0 + k).
template <class T>
inline void part(const ProjectParams& p, int64_t i0, int64_t k, int64_t begin, int64_t end,
                 int64_t j, int64_t n, float* sums) {
    const T* basis = static_cast<const T*>(p.basis.rows);
    const int64_t stride = p.basis.stride, m = p.basis.m;
    const int64_t tile = k <= 4 ? kGroup : kTile;
    for (int64_t i = 0; i < k; ++i)
        std::memset(sums + i * m + j, 0, static_cast<std::size_t>(n) * sizeof(float));
    float z[kBlock * kTile];
    for (int64_t first = begin; first < end; first += tile) {
        const int64_t rows = least(end - first, tile);
        with_real(p.source_dtype,
                  [&](auto number) { factors<decltype(number)>(p, i0, k, first, rows, z); });
        const T* v = basis + first * stride;
        for (int64_t at = j; at < j + n; at += kChunk) {
            const T* next = at + kChunk < j + n ? column(v, at + kChunk)
                                                : column(v + tile * stride, j);
            contract(column(v, at), stride, rows, Factors{z, 1, kTile}, k, least(j + n - at, kChunk),
                     next, sums + at, m);
        }
    }
}

}  // namespace

void project(const ProjectParams& p, int threads) {
    const int64_t d = p.basis.d, m = p.basis.m;
    if (p.k == 0 || m == 0) return;
    const int64_t wanted = most(1, least(kMostParts, d * m / kNumbersPerPart));
    const int64_t rows = ceil_div(ceil_div(d, wanted), kTile) * kTile;
    const int64_t parts = most(1, ceil_div(d, most(rows, 1)));
    const int64_t most_k = least(p.k, kBlock);
    const Floats sums(parts * most_k * m);
    for (int64_t i0 = 0; i0 < p.k; i0 += kBlock) {
        const int64_t k = least(p.k - i0, kBlock);
        // The sums of few identities stay in L2 for whole rows, which memory reads fastest.
        const int64_t columns = k <= 4 ? m : kChunk, blocks = ceil_div(m, columns);
        const int64_t workers = useful_workers(threads, d * m * (1 + k / 4));
        with_basis(p.basis.dtype, [&](auto number) {
            for_pieces(parts * blocks, workers, [&](int64_t piece, int64_t) {
                const int64_t i = piece / blocks, j = piece % blocks * columns;
                part<decltype(number)>(p, i0, k, i * rows, least((i + 1) * rows, d), j,
                                       least(m - j, columns), sums + i * k * m);
            });
        });
        float* out = p.out + i0 * m;
        const int64_t n = k * m, pieces = ceil_div(n, kChunk);
        for_pieces(pieces, useful_workers(threads, parts * n * 4), [&](int64_t piece, int64_t) {
            const int64_t j = piece * kChunk;
            by_vectors(least(n - j, kChunk), [&](int64_t at, const auto& load, const auto& store) {
                Vec sum = load(sums + j + at);
                for (int64_t i = 1; i < parts; ++i) sum = sum + load(sums + i * n + j + at);
                store(out + j + at, sum);
            });
        });
    }
}

}  // namespace w2w::cpu::W2W_ISA
