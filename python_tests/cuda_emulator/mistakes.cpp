// Kernels with the mistakes that the emulator must see, each run once; prints what it said.
#include <cstdio>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace w2w::cuda;

void half_of_a_block_waits(int*) {
    if (threadIdx.x < 32) __syncthreads();
}

void half_of_a_warp_shuffles(int*) {
    if (threadIdx.x < 16)
        __shfl_xor_sync(0xFFFFFFFFu, 1.f, 1);
    else
        __syncwarp();
}

void reads_before_the_copy(int* out) {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    alignas(16) static const int four[4] = {5, 6, 7, 8};
    copy_async<16>(shared, four, 16);
    copies_commit();
    out[0] = shared[0];
    copies_wait<0>();
    out[1] = shared[0];
}

void reads_what_nobody_wrote(int* out) { out[0] = reinterpret_cast<int*>(shared_memory())[0]; }

void say(const char* name, void (*kernel)(int*), unsigned threads, std::size_t shared) {
    int out[2] = {0, 0};
    try {
        launch(name, kernel, 1, static_cast<int>(threads), shared, nullptr, &out[0]);
        std::printf("%s: %d %d\n", name, out[0], out[1]);
    } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
    }
}

int main() {
    say("block", half_of_a_block_waits, 64, 0);
    say("warp", half_of_a_warp_shuffles, 32, 0);
    say("copy", reads_before_the_copy, 1, 16);
    say("memory", reads_what_nobody_wrote, 1, 16);
    say("much", reads_what_nobody_wrote, 1, 100 * 1024);
}
