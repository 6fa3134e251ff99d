// Numbers of f32, bf16 and f16 in memory: one at a time, or 16 bytes at a time where they lie so.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace w2w::cuda {

__host__ __device__ constexpr int size_of(Dtype type) { return type == Dtype::f32 ? 4 : 2; }

// Numbers in 16 bytes.
template <Dtype T>
inline constexpr int kChunk = 16 / size_of(T);

__device__ __forceinline__ float low_bf16(std::uint32_t word) {
    return __uint_as_float(word << 16);
}
__device__ __forceinline__ float high_bf16(std::uint32_t word) {
    return __uint_as_float(word & 0xFFFF0000u);
}

__device__ __forceinline__ float load_number(const void* p, Dtype type, i64 i) {
    if (type == Dtype::f32) return static_cast<const float*>(p)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(p)[i];
    return type == Dtype::bf16 ? low_bf16(bits) : f16_to_f32(bits);
}

// Rounds once, to nearest even.
__device__ __forceinline__ void store_number(void* p, Dtype type, i64 i, float value) {
    if (type == Dtype::f32) {
        static_cast<float*>(p)[i] = value;
    } else {
        const auto word = type == Dtype::bf16 ? to_bf16x2(value, 0.f) : to_f16x2(value, 0.f);
        static_cast<std::uint16_t*>(p)[i] = static_cast<std::uint16_t>(word);
    }
}

__device__ __forceinline__ std::uint32_t word(const uint4& chunk, int i) {
    return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

// kChunk<T> numbers from index i on, as they lie; where not `vector`, one at a time, and zero from
// `count` on.
template <Dtype T>
__device__ __forceinline__ uint4 load_chunk(const void* p, i64 i, i64 count, bool vector) {
    const auto* bytes = static_cast<const unsigned char*>(p) + i * size_of(T);
    if (vector && count >= kChunk<T>) return __ldcs(reinterpret_cast<const uint4*>(bytes));
    std::uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
        if (j >= count) continue;
        if constexpr (T == Dtype::f32) {
            words[j] = reinterpret_cast<const std::uint32_t*>(bytes)[j];
        } else {
            const std::uint32_t bits = reinterpret_cast<const std::uint16_t*>(bytes)[j];
            words[j / 2] |= bits << (j % 2 * 16);
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <Dtype T>
__device__ __forceinline__ void unpack(const uint4& chunk, float (&values)[kChunk<T>]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t bits = word(chunk, i);
        if constexpr (T == Dtype::f32) {
            values[i] = __uint_as_float(bits);
        } else if constexpr (T == Dtype::bf16) {
            values[2 * i] = low_bf16(bits), values[2 * i + 1] = high_bf16(bits);
        } else {
            values[2 * i] = f16_to_f32(static_cast<std::uint16_t>(bits));
            values[2 * i + 1] = f16_to_f32(static_cast<std::uint16_t>(bits >> 16));
        }
    }
}

template <Dtype T>
__device__ __forceinline__ void store_chunk(void* p, i64 i, i64 count, bool vector,
                                            const float (&values)[kChunk<T>]) {
    if (vector && count >= kChunk<T>) {
        std::uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if constexpr (T == Dtype::f32)
                words[j] = __float_as_uint(values[j]);
            else if constexpr (T == Dtype::bf16)
                words[j] = to_bf16x2(values[2 * j], values[2 * j + 1]);
            else
                words[j] = to_f16x2(values[2 * j], values[2 * j + 1]);
        }
        auto* bytes = static_cast<unsigned char*>(p) + i * size_of(T);
        *reinterpret_cast<uint4*>(bytes) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j)
        if (j < count) store_number(p, T, i + j, values[j]);
}

// The sum over a warp, in every lane, in one order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    return value;
}

// Calls run(Constant<T>) for the run-time `type` of f32, bf16 or f16.
template <Dtype T>
struct Constant {
    static constexpr Dtype value = T;
};

template <class Run>
void with_dtype(Dtype type, const Run& run) {
    if (type == Dtype::f32)
        run(Constant<Dtype::f32>{});
    else if (type == Dtype::bf16)
        run(Constant<Dtype::bf16>{});
    else
        run(Constant<Dtype::f16>{});
}

}  // namespace w2w::cuda
