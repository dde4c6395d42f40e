#pragma once

#include <cstdint>
#include <functional>

namespace rellax {

// Calls run(0) ... run(count - 1), each once, on at most `threads` threads of which the caller is one. The others sleep
// between calls: none is left spinning beside those of other libraries. The first exception is thrown on.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& run);

}  // namespace rellax
