// Launches. Their shapes are pure functions of the sizes of a call, never of the GPU: equal calls
// run equal code and give equal bits on every machine.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace w2w::cuda {

using i64 = std::int64_t;

__host__ __device__ constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
__host__ __device__ constexpr i64 least(i64 a, i64 b) { return a < b ? a : b; }
__host__ __device__ constexpr i64 most(i64 a, i64 b) { return a > b ? a : b; }

inline void check(const char* op, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next CUDA call of the process, anyone's, would report it again
    throw std::runtime_error(std::string(op) + " (cuda): " + cudaGetErrorString(error));
}

// Queues a kernel of `blocks` blocks; none where there is nothing to do.
template <class... Wanted, class... Given>
void launch(const char* op, void (*kernel)(Wanted...), i64 blocks, int threads, std::size_t shared,
            void* stream, const Given&... arguments) {
    if (blocks <= 0) return;
    if (blocks > 0x7FFFFFFF)
        throw std::runtime_error(std::string(op) + " (cuda): wanted fewer than 2^31 blocks, got " +
                                 std::to_string(blocks));
    if (shared > 48 * 1024)  // more than every GPU grants unasked
        check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared)));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Wanted>(arguments)...));
}

inline bool aligned(const void* p, i64 bytes) {
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) == 0;
}

}  // namespace w2w::cuda
