// project: parts of d are summed apart, then added in one order. Compiled once per instruction
// set. The parts follow from the basis alone, never from threads or from the batch.
#include "../project.h"

#include "contract.h"
#include "work.h"

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // of a tile that waits in L2
constexpr int64_t kBlock = 16;         // identities a pass over V: what keeps the parts small
constexpr int64_t kMostParts = 64;
constexpr int64_t kNumbersPerPart = 1 << 18;

// z[r, i] of `rows` <= kSteps rows, kBlock numbers a row.
template <class Source>
inline void factors(const ProjectParams& p, int64_t i0, int64_t k, int64_t first, int64_t rows,
                    float* z) {
    const Basis& basis = p.basis;
    const Source* source = static_cast<const Source*>(p.source) + i0 * p.source_stride + first;
    by_vectors(rows, [&](int64_t r, const auto& load, const auto&) {
        const Vec std = load(basis.std + first + r);
        const Vec scale = basis.row_scale ? load(basis.row_scale + first + r) : splat(1);
        const Vec mean = basis.mean && p.divide ? load(basis.mean + first + r) : zero();
        // x / inf is 0 for every finite x, and a NaN or an infinity still shows.
        const Vec divisor = zeros_to_inf(std), gain = std * scale;
        for (int64_t i = 0; i < k; ++i) {
            const Vec x = load(source + i * p.source_stride + r);
            scatter(z + r * kBlock + i, kBlock, p.divide ? (x - mean) / divisor * scale : x * gain,
                    static_cast<int>(least(rows - r, kWidth)));
        }
    });
}

// The sums of rows [begin, begin + rows) and columns [j, j + n) for identities [i0, i0 + k).
template <class T>
inline void part(const ProjectParams& p, int64_t i0, int64_t k, int64_t begin, int64_t rows,
                 int64_t j, int64_t n, float* scratch, float* sums) {
    const int64_t stride = p.basis.stride, m = p.basis.m;
    for (int64_t i = 0; i < k; ++i)
        std::memset(sums + i * m, 0, static_cast<std::size_t>(n) * sizeof(float));
    float z[kStreams * kBlock * kSteps];
    const auto get = [&](int64_t first, int64_t apart, int64_t steps) {
        with_real(p.source_dtype, [&](auto number) {
            for (int s = 0; s < (apart ? kStreams : 1); ++s)
                factors<decltype(number)>(p, i0, k, begin + first + s * apart, steps,
                                          z + s * kBlock * kSteps);
        });
        return Factors{z, kBlock * kSteps, kBlock};
    };
    const T* v = static_cast<const T*>(p.basis.rows) + begin * stride;
    contract(column(v, j), stride, rows, k, n, get, scratch, sums, m);
}

}  // namespace

void project(const ProjectParams& p, int threads) {
    const int64_t d = p.basis.d, m = p.basis.m;
    if (p.k == 0 || m == 0) return;
    const int64_t wanted = most(1, least(kMostParts, d * m / kNumbersPerPart));
    const int64_t rows = most(1, ceil_div(d, wanted));
    const int64_t parts = most(1, ceil_div(d, rows));
    const int64_t most_k = least(p.k, kBlock);
    const Floats sums(parts * most_k * m);
    for (int64_t i0 = 0; i0 < p.k; i0 += kBlock) {
        const int64_t k = least(p.k - i0, kBlock);
        const int64_t columns = k <= 4 ? m : kColumns, blocks = ceil_div(m, columns);
        const int64_t workers = useful_workers(threads, d * m * (1 + k / 4));
        const Floats scratch(workers * kApart);
        with_basis(p.basis.dtype, [&](auto number) {
            for_pieces(parts * blocks, workers, [&](int64_t piece, int64_t worker) {
                const int64_t i = piece / blocks, j = piece % blocks * columns;
                part<decltype(number)>(p, i0, k, i * rows, least(d - i * rows, rows), j,
                                       least(m - j, columns), scratch + worker * kApart,
                                       sums + i * k * m + j);
            });
        });
        const int64_t pieces = ceil_div(m, kColumns), reads = parts * k * m * 4;
        for_pieces(k * pieces, useful_workers(threads, reads), [&](int64_t piece, int64_t) {
            const int64_t i = piece / pieces, j = piece % pieces * kColumns;
            const int64_t n = least(m - j, kColumns);
            float all[kColumns];
            by_vectors(n, [&](int64_t at, const auto& load, const auto& store) {
                const float* sum = sums + i * m + j + at;
                Vec total = load(sum);
                for (int64_t q = 1; q < parts; ++q) total = total + load(sum + q * k * m);
                store(all + at, total);
            });
            with_basis(p.basis.dtype, [&](auto number) {
                unpack<decltype(number)>(all, n, p.out + (i0 + i) * m + j);
            });
        });
    }
}

}  // namespace w2w::cpu::W2W_ISA
