// Work in numbered pieces on several threads, and memory for it. Plain functions with pointers,
// for files compiled once per instruction set: no standard-library template crosses from them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace w2w::cpu {

// work(context, piece, worker) for every piece in [0, pieces), each once, in any order, by at
// most `workers` threads: the caller and others. Returns when all pieces are done.
void in_parallel(std::int64_t pieces, std::int64_t workers,
                 void (*work)(const void* context, std::int64_t piece, std::int64_t worker),
                 const void* context);

// Between 1 and threads: no more than have something to do, given the bytes a call reads and
// writes (or what its arithmetic costs, told in bytes).
std::int64_t useful_workers(int threads, std::int64_t bytes);

void* allocate(std::size_t bytes);  // aligned to 64; throws std::bad_alloc
void release(void* memory);

}  // namespace w2w::cpu
