#pragma once

#include <cstdint>
#include <functional>

namespace rellax {

// OpenMP's entry point GOMP_parallel: runs function(data) on a team of at most `threads` threads, the caller among them.
using ParallelRegion = void(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// The OpenMP runtime whose threads parallel_for takes: PyTorch's, so that no second set of threads fights with it for
// the cores (its threads keep spinning for a while after each of its operators). Null: the caller works alone.
void set_parallel_region(ParallelRegion* region);

// One of `threads` threads for less than two units of work, else all: a team of another size than the one before costs
// OpenMP more than threads without work do, as it ends those that are too many and starts them anew for the next.
int threads_for(int64_t work, int64_t unit, int threads);

// Calls run(0) ... run(count - 1), each once, on at most `threads` threads. The first exception is thrown on. In a
// process forked since set_parallel_region, where OpenMP's threads are missing, the caller works alone.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& run);

}  // namespace rellax
