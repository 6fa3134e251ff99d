// reconstruct, rows of V in tiles. Compiled once per instruction set.
#include "../reconstruct.h"

#include "dot.h"
#include "work.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// Rows of a tile. With one group of identities there is nothing to come back for: a tile is what
// is read while memory fetches the next one. With more, 48 rows of one chunk are 96 KB in bf16:
// they wait in L2 while every group passes. Multiples of every number of rows of dot.h.
constexpr int64_t kSmallTile = 12, kLargeTile = 48;
// Rows are handed out in pieces, so that a core busy with something else holds up only one.
constexpr int64_t kBytesPerPiece = 512 << 10;

template <class Out>
inline void epilogue(const ReconstructParams& p, int64_t first, int64_t rows, const float* sums,
                     int64_t stride) {
    const Basis& basis = p.basis;
    for (int64_t i = 0; i < p.k; ++i) {
        Out* out = static_cast<Out*>(p.out) + i * p.out_stride + first;
        by_vectors(rows, [&](int64_t r, const auto& load, const auto& store) {
            Vec gain = load(basis.std + first + r);
            if (basis.row_scale) gain = gain * load(basis.row_scale + first + r);
            const Vec mean = basis.mean ? load(basis.mean + first + r) : zero();
            store(out + r, fma(gain, load(sums + i * stride + r), mean));
        });
    }
}

template <class T>
inline void piece(const ReconstructParams& p, int64_t tile, int64_t begin, int64_t end,
                  float* sums) {
    const T* basis = static_cast<const T*>(p.basis.rows);
    const int64_t stride = p.basis.stride, m = p.basis.m;
    for (int64_t first = begin; first < end; first += tile) {
        const int64_t rows = least(end - first, tile);
        const T* v = basis + first * stride;
        std::memset(sums, 0, static_cast<std::size_t>(tile * p.k) * sizeof(float));
        for (int64_t j = 0; j < m; j += kChunk) {
            const T* next = j + kChunk < m ? column(v, j + kChunk) : v + tile * stride;
            dot(column(v, j), stride, rows, p.c + j, p.c_stride, p.k, least(m - j, kChunk), next,
                Sums{sums, 1, tile});
        }
        with_real(p.out_dtype,
                  [&](auto out) { epilogue<decltype(out)>(p, first, rows, sums, tile); });
    }
}

inline int64_t row_bytes(const Basis& basis) {
    switch (basis.dtype) {
        case Dtype::f32: return 4 * basis.m;
        case Dtype::bf16: return 2 * basis.m;
        case Dtype::u4: return (basis.m + 1) / 2;
        default: return basis.m;
    }
}

}  // namespace

void reconstruct(const ReconstructParams& p, int threads) {
    const int64_t d = p.basis.d, groups = ceil_div(p.k, kIdentities);
    if (p.k == 0 || d == 0) return;
    const int64_t bytes = most(row_bytes(p.basis), 1);
    const int64_t tile = groups == 1 ? kSmallTile : kLargeTile;
    const int64_t step = tile * most(1, kBytesPerPiece / (bytes * tile));
    const int64_t workers = useful_workers(threads, d * bytes * groups);
    const Floats sums(workers * tile * p.k);
    with_basis(p.basis.dtype, [&](auto number) {
        for_pieces(ceil_div(d, step), workers, [&](int64_t i, int64_t worker) {
            piece<decltype(number)>(p, tile, i * step, least((i + 1) * step, d),
                                    sums + worker * tile * p.k);
        });
    });
}

}  // namespace w2w::cpu::W2W_ISA
