// The CUDA that the kernels use, on the host: enough to run csrc/cuda unchanged in tests.
//
// A block's threads are fibers that take turns; blocks run one after another. A barrier or an
// exchange between lanes waits until all who must be there have come, and one that some never reach
// is an error, as are lanes that meet at different instructions. Shared memory is allocated to the
// byte, and read as NaN until written, so that the address sanitizer and the tests see misuse.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
    return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace emulator {

constexpr int kLanes = 32, kStack = 256 * 1024;
constexpr std::size_t kUnasked = 48 * 1024, kMostShared = 99 * 1024;  // sm_86 and sm_89 have least

// A copy in the background: it is made when its group is waited for.
struct Copy {
    void* to;
    const void* from;
    int bytes, inside;
};

struct Meeting {  // of a warp or a block
    int expected = 0, arrived = 0, count = 0;
    const char* what = nullptr;
};

struct Thread {
    unsigned index;
    ucontext_t start;
    std::jmp_buf now;
    bool started = false, done = false;
    Meeting* waits = nullptr;
    int waits_for = 0;  // the meeting's count that lets it go on
    std::vector<std::vector<Copy>> copies{1};
};

struct Warp {
    Meeting meeting;
    std::uint32_t slots[2][kLanes][8];  // what lanes show each other, two exchanges in turn
};

struct Block {
    unsigned index = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Meeting all;
    int votes = 0, counted[2] = {};
    std::unique_ptr<unsigned char[]> shared;
    const std::function<void()>* body;
    std::jmp_buf scheduler;
    Thread* current = nullptr;
    std::string error;
};

inline Block* g_block = nullptr;
inline std::string g_error;
inline std::map<const void*, std::size_t> g_granted;  // shared memory asked for, by kernel

inline Thread& self() { return *g_block->current; }
inline int lane() { return static_cast<int>(self().index % kLanes); }
inline Warp& warp() { return g_block->warps[self().index / kLanes]; }

// Back to the scheduler, until this thread's turn comes again.
inline void give_way() {
    if (!_setjmp(self().now)) _longjmp(g_block->scheduler, 1);
}

inline void meet(Meeting& meeting, const char* what) {
    if (meeting.arrived && std::strcmp(meeting.what, what))
        g_block->error = std::string("threads meet at ") + meeting.what + " and at " + what;
    meeting.what = what;
    const int count = meeting.count;
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0, ++meeting.count;
        return;
    }
    self().waits = &meeting, self().waits_for = count + 1;
    while (meeting.count == count) give_way();
    self().waits = nullptr;
}

inline void enter() {
    (*g_block->body)();
    self().done = true;
    _longjmp(g_block->scheduler, 1);
}

// Lets a thread run until it gives way.
inline void turn(Block& block, Thread& thread, unsigned char* stack) {
    block.current = &thread;
    if (_setjmp(block.scheduler)) return;
    if (thread.started) _longjmp(thread.now, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, enter, 0);
    setcontext(&thread.start);
}

inline void run_block(Block& block, std::vector<std::unique_ptr<unsigned char[]>>& stacks) {
    g_block = &block;
    for (bool going = true; going && block.error.empty();) {
        bool moved = going = false;
        for (auto& thread : block.threads) {
            if (thread.done) continue;
            going = true;
            if (thread.waits && thread.waits->count < thread.waits_for) continue;
            moved = true;
            turn(block, thread, stacks[thread.index].get());
        }
        if (going && !moved) block.error = "a barrier that not all threads reach";
    }
}

inline cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                       const std::function<void()>& body) {
    const std::size_t threads = config.blockDim.x, shared = config.dynamicSmemBytes;
    if (!threads || threads > 1024 || !config.gridDim.x || config.gridDim.x > 0x7FFFFFFF ||
        shared > std::max(kUnasked, g_granted[kernel]))
        return cudaErrorInvalidValue;
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() < threads) stacks.emplace_back(new unsigned char[kStack]);
    for (unsigned i = 0; i < config.gridDim.x; ++i) {
        Block block;
        block.index = i;
        block.body = &body;
        block.threads.resize(threads);
        block.warps.resize((threads + kLanes - 1) / kLanes);
        block.all.expected = static_cast<int>(threads);
        for (unsigned t = 0; t < threads; ++t) {
            block.threads[t].index = t;
            ++block.warps[t / kLanes].meeting.expected;
        }
        block.shared.reset(new unsigned char[shared]);
        std::fill_n(block.shared.get(), shared, 0xFF);
        run_block(block, stacks);
        g_block = nullptr;
        if (!block.error.empty()) {
            g_error = "emulator: " + block.error;
            return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

// What every lane of the warp shows, in words.
template <class T>
const T* exchange(const T& mine, const char* what) {
    static_assert(sizeof(T) <= sizeof(Warp::slots[0][0]) && sizeof(T) % 4 == 0);
    Warp& w = warp();
    auto& slots = w.slots[w.meeting.count % 2];
    std::memcpy(slots[lane()], &mine, sizeof(T));
    meet(w.meeting, what);
    static thread_local T seen[kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&seen[i], slots[i], sizeof(T));
    return seen;
}

// One of the numbers that CUDA's built-in variables have, asked for when it is used.
template <unsigned (*NUMBER)()>
struct Number {
    operator unsigned() const { return NUMBER(); }
};
template <unsigned (*NUMBER)()>
struct Variable {
    Number<NUMBER> x;
};

inline unsigned thread() { return self().index; }
inline unsigned block() { return g_block->index; }
inline unsigned threads() { return static_cast<unsigned>(g_block->threads.size()); }

}  // namespace emulator

inline constexpr emulator::Variable<emulator::thread> threadIdx{};
inline constexpr emulator::Variable<emulator::block> blockIdx{};
inline constexpr emulator::Variable<emulator::threads> blockDim{};

inline void __syncthreads() { emulator::meet(emulator::g_block->all, "__syncthreads"); }
inline void __syncwarp() { emulator::meet(emulator::warp().meeting, "__syncwarp"); }

inline int __syncthreads_count(int vote) {
    auto& block = *emulator::g_block;
    const int turn = block.all.count % 2;
    block.votes += vote != 0;
    if (block.all.arrived + 1 == block.all.expected)  // the last one counts, for all
        block.counted[turn] = std::exchange(block.votes, 0);
    emulator::meet(block.all, "__syncthreads_count");
    return block.counted[turn];
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    const int from = emulator::lane() ^ mask;
    return emulator::exchange(value, "__shfl_xor_sync")[from];
}

inline float __shfl_down_sync(unsigned, float value, int delta) {
    const int from = emulator::lane() + delta;
    return emulator::exchange(value, "__shfl_down_sync")[from < 32 ? from : emulator::lane()];
}

template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}

inline float __uint_as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline std::uint32_t __float_as_uint(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Each byte of the result: byte 0 to 7 of y:x by a digit of `selector`.
inline std::uint32_t __byte_perm(std::uint32_t x, std::uint32_t y, std::uint32_t selector) {
    const std::uint64_t both = std::uint64_t{y} << 32 | x;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<std::uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidValue ? "invalid argument" : emulator::g_error.c_str();
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    const auto size = static_cast<std::size_t>(bytes);
    if (size > emulator::kMostShared) return cudaErrorInvalidValue;
    emulator::g_granted[reinterpret_cast<const void*>(kernel)] = size;
    return cudaSuccess;
}

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...),
                               Given&&... given) {
    return emulator::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(given...); });
}
