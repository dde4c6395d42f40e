#include "parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

namespace rellax {
namespace {

ParallelRegion* parallel_region = nullptr;
pid_t owner = 0;

// One call's work, shared by the threads that take part in it.
class Job {
public:
    Job(int64_t count, const std::function<void(int64_t)>& run) : count_(count), run_(run) {}

    void work() {
        try {
            for (int64_t index; (index = next_.fetch_add(1)) < count_;) run_(index);
        } catch (...) {
            next_ = count_;
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    const int64_t count_;
    const std::function<void(int64_t)>& run_;
    std::atomic<int64_t> next_{0};
    std::mutex mutex_;
    std::exception_ptr error_;
};

}  // namespace

void set_parallel_region(ParallelRegion* region) {
    parallel_region = region;
    owner = getpid();
}

int threads_for(int64_t work, int64_t unit, int threads) { return work < 2 * unit ? 1 : std::max(threads, 1); }

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& run) {
    Job job(count, run);
    if (std::min<int64_t>(threads, count) > 1 && parallel_region != nullptr && owner == getpid()) {
        parallel_region([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        job.work();
    }
    job.rethrow();
}

}  // namespace rellax
