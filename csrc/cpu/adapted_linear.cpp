// low_rank and outer. Compiled once per instruction set. Adapters are packed as rows of f32
// first, whatever their strides: a few thousand numbers against the activations' millions.
#include "../adapted_linear.h"

#include "contract.h"
#include "dot.h"
#include "update.h"
#include "work.h"

namespace w2w::cpu::W2W_ISA {
namespace {

constexpr int64_t kTokens = 48;         // a piece of low_rank; they stay in L2 from down to up
constexpr int64_t kTokensPerPart = 240;  // of outer
constexpr int64_t kColumns = 1024;       // of outer, a piece

struct Packed {
    const float *down, *up;  // [rank, in], [rank, out]
};

template <class T, class Adapter>
inline void pack_adapter(const LowRankParams& p, int64_t a, float* to) {
    const Adapter* down = static_cast<const Adapter*>(p.down) + a * p.down_a;
    const Adapter* up = static_cast<const Adapter*>(p.up) + a * p.up_a;
    for (int64_t r = 0; r < p.rank; ++r) {
        pack<T>(down + r * p.down_r, p.down_i, p.in, to + r * p.in);
        if (p.y) pack<T>(up + r * p.up_r, p.up_n, p.out, to + p.rank * p.in + r * p.out);
    }
}

template <class T>
inline void token_block(const LowRankParams& p, Packed adapter, int64_t b, int64_t t,
                        int64_t rows) {
    const T* x = static_cast<const T*>(p.x) + b * p.x_b + t * p.x_t;
    float* s = p.s + (b * p.tokens + t) * p.rank;
    std::memset(s, 0, static_cast<std::size_t>(rows * p.rank) * sizeof(float));
    dot(x, p.x_t, rows, adapter.down, p.in, p.rank, p.in, Sums{s, p.rank, 1});
    if (!p.y) return;
    T* y = static_cast<T*>(p.y) + b * p.y_b + t * p.y_t;
    const T* base = p.base ? static_cast<const T*>(p.base) + b * p.base_b + t * p.base_t : nullptr;
    const float scale = p.scales ? p.scales[b] : p.scale;
    update(Update<T>{y, p.y_t, base, p.base_t, s, adapter.up, p.out, p.rank, scale}, rows, p.out,
           false);
}

inline int64_t adapter_of(const int64_t* index, int64_t adapters, int64_t b) {
    return index ? index[b] : adapters == 1 ? 0 : b;
}

// out[a, r, columns]: a's samples in their order, each the sum of its parts in their order.
template <class T, class Out>
inline void gather_parts(const OuterParams& p, const float* parts, int64_t count, int64_t a,
                         int64_t r, int64_t j, int64_t n) {
    float packed[kColumns], all[kColumns];
    by_vectors(n, [&](int64_t at, const auto& load, const auto& store) {
        Vec total = zero();
        for (int64_t b = 0; b < p.samples; ++b) {
            if (adapter_of(p.index, p.adapters, b) != a) continue;
            Vec sum = zero();
            for (int64_t i = 0; i < count; ++i)
                sum = sum + load(parts + ((b * count + i) * p.rank + r) * p.width + j + at);
            total = fma(splat(p.scales ? p.scales[b] : p.scale), sum, total);
        }
        store(packed + at, total);
    });
    unpack<T>(packed, n, all);
    Out* out = static_cast<Out*>(p.out) + a * p.out_a + r * p.out_r + j * p.out_n;
    by_vectors(n, [&](int64_t at, const auto& load, const auto&) {
        scatter(out + at * p.out_n, p.out_n, load(all + at),
                static_cast<int>(least(n - at, kWidth)));
    });
}

}  // namespace

void low_rank(const LowRankParams& p, int threads) {
    if (p.samples == 0 || p.tokens == 0) return;
    const int64_t size = p.dtype == Dtype::f32 ? 4 : 2, rows = p.samples * p.tokens;
    const int64_t moved = rows * size * (p.in + (p.y ? (p.base ? 2 : 1) * p.out : 0));
    const int64_t workers = useful_workers(threads, moved * ceil_div(p.rank, kIdentities));

    const bool shared = p.adapters == 1;
    const int64_t packs = shared ? 1 : p.samples, numbers = p.rank * (p.in + p.out);
    const Floats packed(packs * numbers);
    with_real(p.dtype, [&](auto number) {
        with_real(p.adapter_dtype, [&](auto factor) {
            const int64_t helpers = useful_workers(threads, packs * numbers * 4);
            for_pieces(packs, helpers, [&](int64_t i, int64_t) {
                pack_adapter<decltype(number), decltype(factor)>(
                    p, adapter_of(p.index, p.adapters, i), packed + i * numbers);
            });
        });
    });

    const int64_t blocks = ceil_div(p.tokens, kTokens);
    with_real(p.dtype, [&](auto number) {
        for_pieces(p.samples * blocks, workers, [&](int64_t piece, int64_t) {
            const int64_t b = piece / blocks, t = piece % blocks * kTokens;
            const float* adapter = packed + (shared ? 0 : b) * numbers;
            token_block<decltype(number)>(p, {adapter, adapter + p.rank * p.in}, b, t,
                                          least(p.tokens - t, kTokens));
        });
    });
}

void outer(const OuterParams& p, int threads) {
    const int64_t parts = ceil_div(p.tokens, kTokensPerPart), blocks = ceil_div(p.width, kColumns);
    const int64_t size = p.dtype == Dtype::f32 ? 4 : 2;
    const int64_t bytes = p.samples * p.tokens * p.width * size;
    const Floats sums(p.samples * parts * p.rank * p.width);
    with_real(p.dtype, [&](auto number) {
        using T = decltype(number);
        const int64_t workers = useful_workers(threads, bytes * ceil_div(p.rank, 4));
        const Floats scratch(workers * kApart);
        for_pieces(p.samples * parts * blocks, workers, [&](int64_t piece, int64_t worker) {
            const int64_t b = piece / blocks / parts, part = piece / blocks % parts;
            const int64_t t = part * kTokensPerPart, j = piece % blocks * kColumns;
            const int64_t rows = least(p.tokens - t, kTokensPerPart);
            const int64_t n = least(p.width - j, kColumns);
            float* out = sums + (b * parts + part) * p.rank * p.width + j;
            for (int64_t r = 0; r < p.rank; ++r)
                std::memset(out + r * p.width, 0, static_cast<std::size_t>(n) * sizeof(float));
            const T* feature = static_cast<const T*>(p.feature) + b * p.feature_b + t * p.feature_t;
            const float* coefficient = p.coefficient + (b * p.tokens + t) * p.rank;
            const auto factors = [&](int64_t first, int64_t apart, int64_t) {
                return Factors{coefficient + first * p.rank, apart * p.rank, p.rank};
            };
            contract(feature + j, p.feature_t, rows, p.rank, n, factors, scratch + worker * kApart,
                     out, p.width);
        });
    });
    const int64_t numbers = p.samples * parts * p.rank * p.width;
    with_real(p.dtype, [&](auto number) {
        with_real(p.out_dtype, [&](auto result) {
            for_pieces(p.adapters * p.rank * blocks, useful_workers(threads, numbers * 4),
                       [&](int64_t piece, int64_t) {
                           const int64_t a = piece / blocks / p.rank, r = piece / blocks % p.rank;
                           const int64_t j = piece % blocks * kColumns;
                           gather_parts<decltype(number), decltype(result)>(
                               p, sums, parts, a, r, j, least(p.width - j, kColumns));
                       });
        });
    });
}

}  // namespace w2w::cpu::W2W_ISA
