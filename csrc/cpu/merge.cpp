// merge: bands of rows of all modules. Compiled once per instruction set.
#include "../merge.h"

#include "update.h"
#include "work.h"

namespace w2w::cpu::W2W_ISA {
namespace {

// Output larger than this goes past the caches: it would not stay there, and a store through a
// cache first reads what it overwrites.
constexpr int64_t kLarge = 8 << 20;

template <class T>
inline T* moved(const void* first, int64_t bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(first) +
                                static_cast<std::uintptr_t>(bytes));
}

// Rows [begin, begin + rows) of a module; a: scratch for A and those rows of B.
template <class T, class Adapter>
inline void band(const MergeParams& p, const MergeModule& module, int64_t begin, int64_t rows,
                 bool past, float* a) {
    const int64_t n = module.in;
    if (n == 0) return;
    T* out = moved<T>(p.out, module.out_at) + begin * n;
    const T* weight = moved<const T>(p.weight, module.weight_at) + begin * n;
    if (p.scale == 0) {  // and not - 0 + 0 = 0
        std::memcpy(out, weight, static_cast<std::size_t>(rows * n) * sizeof(T));
        return;
    }
    float* b = a + p.rank * n;
    for (int64_t r = 0; r < p.rank; ++r)
        pack<T>(moved<const Adapter>(p.a, module.a_at) + r * n, 1, n, a + r * n);
    pack<float>(moved<const Adapter>(p.b, module.b_at) + begin * p.rank, 1, rows * p.rank, b);
    update(Update<T>{out, n, weight, n, b, a, n, p.rank, p.scale}, rows, n, past);
}

}  // namespace

void merge(const MergeParams& p, int threads) {
    int64_t bands = 0, weights = 0, widest = 0;
    for (int64_t i = 0; i < p.modules; ++i) {
        bands += ceil_div(p.table[i].out, kMergeTile);
        weights += p.table[i].out * p.table[i].in;
        widest = most(widest, p.table[i].in);
    }
    if (weights == 0) return;
    const int64_t size = p.dtype == Dtype::f32 ? 4 : 2;
    const int64_t workers = useful_workers(threads, 2 * weights * size);
    const int64_t scratch = ceil_div(p.rank * (widest + kMergeTile), 16) * 16;
    const Floats factors(workers * scratch);
    const bool past = weights * size > kLarge;
    with_real(p.dtype, [&](auto number) {
        with_real(p.adapter_dtype, [&](auto factor) {
            for_pieces(bands, workers, [&](int64_t piece, int64_t worker) {
                const MergeModule* module = p.table;
                for (int64_t here; piece >= (here = ceil_div(module->out, kMergeTile)); ++module)
                    piece -= here;
                const int64_t begin = piece * kMergeTile;
                band<decltype(number), decltype(factor)>(p, *module, begin,
                                                         least(kMergeTile, module->out - begin),
                                                         past, factors + worker * scratch);
            });
        });
    });
}

}  // namespace w2w::cpu::W2W_ISA
