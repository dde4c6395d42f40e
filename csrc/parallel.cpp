#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace rellax {

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& run) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;

    const auto work = [&] {
        try {
            for (int64_t index; (index = next.fetch_add(1)) < count;) run(index);
        } catch (...) {
            next = count;
            const std::lock_guard<std::mutex> lock(error_mutex);
            if (!error) error = std::current_exception();
        }
    };

    std::vector<std::thread> others;
    const int64_t wanted = std::min<int64_t>(threads, count);
    for (int64_t thread = 1; thread < wanted; ++thread) others.emplace_back(work);
    work();
    for (std::thread& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace rellax
