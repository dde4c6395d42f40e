// Memory in large pages where there are such: fewer pages to hand out and to look up.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
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

// Memory without a constructor's pass over it. Where it is used for long enough to pay for them, it is a mapping of its
// own in large pages: asked for within the heap they would stay there, resident, when it is freed.
class Memory {
public:
    explicit Memory(int64_t bytes, bool large = true) {
        if (large && bytes >= kLargePage) {
            mapped_ = (bytes + kLargePage - 1) / kLargePage * kLargePage + kLargePage;
            begin_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (begin_ == MAP_FAILED) throw std::bad_alloc();
            const uintptr_t begin = reinterpret_cast<uintptr_t>(begin_);
            data_ = reinterpret_cast<void*>((begin + kLargePage - 1) / kLargePage * kLargePage);
            advise_large_pages(data_, mapped_ - kLargePage);
        } else {
            data_ = begin_ = operator new(bytes, kAlignment);
        }
    }
    ~Memory() {
        if (mapped_ > 0) {
            munmap(begin_, mapped_);
        } else {
            operator delete(begin_, kAlignment);
        }
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void* data() const { return data_; }

private:
    static constexpr std::align_val_t kAlignment{64};
    int64_t mapped_ = 0;  // bytes; 0: from the heap
    void* begin_;
    void* data_;
};

}  // namespace rellax
