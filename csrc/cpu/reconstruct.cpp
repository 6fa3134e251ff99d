// reconstruct, rows of V in tiles. Compiled once per instruction set.
#include "../reconstruct.h"

#include "coefficients.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// Rows are handed out in pieces, so that a core busy with something else holds up only one.
constexpr int64_t kBytesPerPiece = 512 << 10, kSumsPerPiece = 1 << 16;

template <class Out>
inline void epilogue(const ReconstructParams& p, int64_t first, int64_t rows, const float* sums) {
    const Basis& basis = p.basis;
    for (int64_t i = 0; i < p.k; ++i) {
        Out* out = static_cast<Out*>(p.out) + i * p.out_stride + first;
        by_vectors(rows, [&](int64_t r, const auto& load, const auto& store) {
            Vec gain = load(basis.std + first + r);
            if (basis.row_scale) gain = gain * load(basis.row_scale + first + r);
            const Vec mean = basis.mean ? load(basis.mean + first + r) : zero();
            store(out + r, fma(gain, load(sums + i * rows + r), mean));
        });
    }
}

// Rows [begin, begin + rows); sums: scratch for rows * k numbers.
template <class T>
inline void piece(const ReconstructParams& p, const Coefficients<T>& c, int64_t begin,
                  int64_t rows, float* sums) {
    const T* v = static_cast<const T*>(p.basis.rows) + begin * p.basis.stride;
    std::memset(sums, 0, static_cast<std::size_t>(rows * p.k) * sizeof(float));
    c.multiply(v, p.basis.stride, rows, sums);
    with_real(p.out_dtype, [&](auto out) { epilogue<decltype(out)>(p, begin, rows, sums); });
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
    const int64_t wanted = least(kBytesPerPiece / bytes, kSumsPerPiece / p.k);
    const int64_t step = most(1, wanted / kDotTile) * kDotTile;
    const int64_t workers = useful_workers(threads, d * bytes * groups);
    const Floats sums(workers * step * p.k);
    with_basis(p.basis.dtype, [&](auto number) {
        const Coefficients<decltype(number)> c(p.c, p.c_stride, p.k, p.basis.m);
        for_pieces(ceil_div(d, step), workers, [&](int64_t i, int64_t worker) {
            piece<decltype(number)>(p, c, i * step, least(d - i * step, step),
                                    sums + worker * step * p.k);
        });
    });
}

}  // namespace w2w::cpu::W2W_ISA
