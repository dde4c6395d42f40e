// Memory in large pages where there are such: fewer pages to hand out and to look up.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rellax {

constexpr int64_t kLargePage = int64_t{1} << 21;

// Asks for large pages within memory of any origin, before it is first written.
inline void advise_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage;
    const uintptr_t last = (begin + bytes) / kLargePage * kLargePage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Memory of its own in such pages, without a constructor's pass over it.
class Pages {
public:
    explicit Pages(int64_t bytes) {
        const int64_t size = (bytes > 0 ? (bytes + kLargePage - 1) / kLargePage : 1) * kLargePage;
        memory_.reset(operator new(size, kAlignment));
        advise_large_pages(memory_.get(), size);
    }

    void* get() const { return memory_.get(); }

private:
    static constexpr std::align_val_t kAlignment{kLargePage};
    struct Free {
        void operator()(void* memory) const { operator delete(memory, kAlignment); }
    };

    std::unique_ptr<void, Free> memory_;
};

}  // namespace rellax
