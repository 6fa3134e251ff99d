#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace w2w::cpu {
namespace {

// One call, shared by its threads. The caller waits for pieces, not for threads: one that finds
// its core busy and starts late (a time slice is milliseconds) finds nothing left and is not
// missed; by then context may be gone, and it does not look.
struct Job {
    const std::int64_t pieces;
    void (*const work)(const void*, std::int64_t, std::int64_t);
    const void* const context;
    std::atomic<std::int64_t> next{0};
    std::mutex mutex{};
    std::condition_variable finished{};
    std::int64_t done = 0;  // pieces, under the mutex

    void run(std::int64_t worker) {
        std::int64_t count = 0;
        for (std::int64_t piece; (piece = next.fetch_add(1)) < pieces; ++count)
            work(context, piece, worker);
        if (count == 0) return;
        const std::lock_guard<std::mutex> lock(mutex);
        if ((done += count) == pieces) finished.notify_one();
    }

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        finished.wait(lock, [this] { return done == pieces; });
    }
};

// Starting a thread costs 20 to 100 microseconds; one core reads this much in 150 or so.
constexpr std::int64_t kBytesWorthAThread = 2 << 20;

}  // namespace

void in_parallel(std::int64_t pieces, std::int64_t workers,
                 void (*work)(const void*, std::int64_t, std::int64_t), const void* context) {
    workers = std::min(workers, pieces);
    if (workers <= 1) {
        for (std::int64_t piece = 0; piece < pieces; ++piece) work(context, piece, 0);
        return;
    }
    const auto job = std::shared_ptr<Job>(new Job{pieces, work, context});
    try {
        for (std::int64_t i = 1; i < workers; ++i) std::thread([job, i] { job->run(i); }).detach();
    } catch (const std::system_error&) {
        // No more threads to be had: those that started and this one finish all the pieces.
    }
    job->run(0);
    job->wait();
}

std::int64_t useful_workers(int threads, std::int64_t bytes) {
    return std::clamp<std::int64_t>(bytes / kBytesWorthAThread, 1, std::max(threads, 1));
}

void* allocate(std::size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }

void release(void* memory) { ::operator delete(memory, std::align_val_t{64}); }

}  // namespace w2w::cpu
