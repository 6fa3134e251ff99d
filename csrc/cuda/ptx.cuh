// The instructions that C++ has no word for, a tiny function each. The tests compile the kernels
// for the host, with these functions in plain C++ (W2W_EMULATED); nothing else differs there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef W2W_EMULATED
#include "emulated_ptx.h"
#else

namespace w2w::cuda {

// A block's shared memory; its size is given at the launch.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

__device__ __forceinline__ float f16_to_f32(std::uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Two numbers rounded to nearest even: `low` in the lower half of the word.
__device__ __forceinline__ std::uint32_t to_f16x2(float low, float high) {
    std::uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ std::uint32_t to_bf16x2(float low, float high) {
    std::uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// a + b for two bf16 a word. sm_80 adds bf16 only as part of a * 1 + b.
__device__ __forceinline__ std::uint32_t add_bf16x2(std::uint32_t a, std::uint32_t b) {
    std::uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return sum;
}

// acc [16, 8] += A [16, 16] B [16, 8] of bf16, spread over a warp: with g = lane / 4, t = lane % 4
//   a0 A[g][2t, 2t+1]   a1 A[g+8][2t, 2t+1]   a2 A[g][2t+8, 2t+9]   a3 A[g+8][2t+8, 2t+9]
//   b0 B[2t, 2t+1][g]   b1 B[2t+8, 2t+9][g]
//   acc[0, 1] [g][2t, 2t+1]                   acc[2, 3] [g+8][2t, 2t+1]
__device__ __forceinline__ void mma(float (&acc)[4], std::uint32_t a0, std::uint32_t a1,
                                    std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                    std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Copies `inside` of BYTES (16, 8 or 4) from global to shared memory and zeroes the rest, in the
// background: done for this thread after copies_wait, for others after a barrier too.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int inside) {
    const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
                     "l"(global), "r"(inside)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                     "n"(BYTES), "r"(inside)
                     : "memory");
    }
}

__device__ __forceinline__ void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all of this thread's groups of copies but the newest NEWEST.
template <int NEWEST>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWEST) : "memory");
}

}  // namespace w2w::cuda

#endif
