// Which instruction set this machine runs, and the split of the rows over threads.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "reconstruct_rows.h"

#ifdef W2W_X86
#include <cpuid.h>
#endif

namespace w2w::cpu {
namespace {

#ifdef W2W_X86
struct X86 {
    bool avx2 = false, avx512 = false;

    X86() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        const bool fma = c & (1u << 12), osxsave = c & (1u << 27);
        if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        // The processor's word is not enough: the operating system must save the registers.
        unsigned xcr0, high;
        __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
        const bool saves_ymm = (xcr0 & 0x06) == 0x06, saves_zmm = (xcr0 & 0xe6) == 0xe6;
        const unsigned f = 1u << 16, bw = 1u << 30, vl = 1u << 31;
        avx2 = saves_ymm && fma && (b & (1u << 5));
        avx512 = avx2 && saves_zmm && (b & f) && (b & bw) && (b & vl);
    }
};
const X86 x86;
#endif

struct Isa {
    const char* name;
    bool supported;
    RowsFn rows;
};

const Isa kIsas[] = {  // best first
#ifdef W2W_X86
    {"avx512", x86.avx512, avx512::reconstruct_rows},
    {"avx2", x86.avx2, avx2::reconstruct_rows},
#endif
    {"portable", true, portable::reconstruct_rows},
};

std::atomic<const Isa*> in_use{
    std::find_if(std::begin(kIsas), std::end(kIsas), [](const Isa& isa) { return isa.supported; })};

// Starting a thread costs 20 to 100 microseconds; one core reads this much in 150 or so.
constexpr std::int64_t kBytesWorthAThread = 4 << 20;
// Rows are handed out in pieces, so that a core busy with something else holds up only one.
constexpr std::int64_t kBytesPerPiece = 256 << 10;

// One call, shared by its threads. The caller waits for rows, not for threads: one that finds its
// core busy and starts late (a time slice is milliseconds) finds nothing left and is not missed.
struct Job {
    const ReconstructParams p;
    const RowsFn rows;
    const std::int64_t piece;
    std::vector<float> sums;
    std::atomic<std::int64_t> next{0};
    std::mutex mutex{};
    std::condition_variable finished{};
    std::int64_t done = 0;  // rows, under the mutex

    void work(std::int64_t worker) {
        float* mine = sums.data() + worker * kTile * p.k;
        std::int64_t count = 0;
        for (std::int64_t begin; (begin = next.fetch_add(piece)) < p.d;) {
            const std::int64_t end = std::min(begin + piece, p.d);
            rows(p, begin, end, mine);
            count += end - begin;
        }
        if (count == 0) return;
        const std::lock_guard<std::mutex> lock(mutex);
        if ((done += count) == p.d) finished.notify_one();
    }

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        finished.wait(lock, [this] { return done == p.d; });
    }
};

}  // namespace

void reconstruct(const ReconstructParams& p, int threads) {
    if (p.k == 0 || p.d == 0) return;
    const std::int64_t row_bytes =
        std::max<std::int64_t>(1, p.m * (p.basis_dtype == Dtype::f32 ? 4 : 2));
    const std::int64_t piece =
        kTile * std::max<std::int64_t>(1, kBytesPerPiece / (row_bytes * kTile));
    const std::int64_t useful =
        std::max<std::int64_t>(1, p.d * row_bytes * ((p.k + 3) / 4) / kBytesWorthAThread);
    const std::int64_t workers = std::clamp<std::int64_t>(threads, 1, useful);

    const auto job = std::shared_ptr<Job>(
        new Job{p, in_use.load()->rows, piece,
                std::vector<float>(static_cast<std::size_t>(workers * kTile * p.k))});
    try {
        for (std::int64_t i = 1; i < workers; ++i)
            std::thread([job, i] { job->work(i); }).detach();
    } catch (const std::system_error&) {
        // No more threads to be had: those that started and this one finish all the rows.
    }
    job->work(0);
    job->wait();
}

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) names.emplace_back(isa.name);
    return names;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas)
        if (isa.supported) names.emplace_back(isa.name);
    return names;
}

std::string isa() { return in_use.load()->name; }

void set_isa(const std::string& name) {
    for (const Isa& isa : kIsas)
        if (isa.supported && name == isa.name) {
            in_use.store(&isa);
            return;
        }
    std::string wanted;
    for (const std::string& s : supported_isas()) wanted += (wanted.empty() ? "" : ", ") + s;
    throw std::invalid_argument("isa: wanted one of " + wanted + ", got " + name);
}

}  // namespace w2w::cpu
