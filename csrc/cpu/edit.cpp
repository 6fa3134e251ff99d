// edit: one row after another in pieces. Compiled once per instruction set.
#include "../edit.h"

#include "vec.h"
#include "work.h"

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int64_t kPiece = 1 << 16;  // numbers

template <class T, class Delta>
inline void piece(const EditParams& p, int64_t i, int64_t begin, int64_t n) {
    const T* w = static_cast<const T*>(p.w) + i * p.w_stride + begin;
    const Delta* delta = static_cast<const Delta*>(p.delta) + begin;
    T* out = static_cast<T*>(p.out) + i * p.out_stride + begin;
    const Vec amount = splat(p.amounts ? p.amounts[i] : p.amount);
    by_vectors(n, [&](int64_t j, const auto& load, const auto& store) {
        store(out + j, fma(amount, load(delta + j), load(w + j)));
    });
}

}  // namespace

void edit(const EditParams& p, int threads) {
    const int64_t blocks = ceil_div(p.d, kPiece);
    const int64_t workers = useful_workers(threads, p.k * p.d * (p.dtype == Dtype::f32 ? 8 : 4));
    with_real(p.dtype, [&](auto number) {
        with_real(p.delta_dtype, [&](auto step) {
            for_pieces(p.k * blocks, workers, [&](int64_t at, int64_t) {
                const int64_t begin = at % blocks * kPiece;
                piece<decltype(number), decltype(step)>(p, at / blocks, begin,
                                                        least(kPiece, p.d - begin));
            });
        });
    });
}

}  // namespace w2w::cpu::W2W_ISA
