#include "parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace rellax {
namespace {

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

// Threads that sleep between jobs.
class Pool {
public:
    // Runs the job on the caller and up to `helpers` threads.
    void run(Job& job, int64_t helpers) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (; threads_ < helpers; ++threads_) std::thread([this] { serve(); }).detach();
            job_ = &job;
            wanted_ = helpers;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // who has not come yet need not: nothing is left
        done_.wait(lock, [this] { return busy_ == 0; });
    }

    std::mutex in_use;

private:
    [[noreturn]] void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++busy_;
            Job& job = *job_;
            lock.unlock();
            job.work();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int64_t threads_ = 0, wanted_ = 0, busy_ = 0;
};

// This process's pool. A forked child has none of its parent's threads and gets a pool of its own. Pools are never
// destroyed: their threads sleep until the process ends.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static pid_t owner = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {
        current = new Pool;
        owner = getpid();
    }
    return *current;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& run) {
    Job job(count, run);
    const int64_t helpers = std::min<int64_t>(threads, count) - 1;
    Pool* const sleeping = helpers > 0 ? &pool() : nullptr;
    // Where another thread's call has the pool, the caller works alone.
    if (sleeping != nullptr && sleeping->in_use.try_lock()) {
        const std::lock_guard<std::mutex> lock(sleeping->in_use, std::adopt_lock);
        sleeping->run(job, helpers);
    } else {
        job.work();
    }
    job.rethrow();
}

}  // namespace rellax
