// Memory that a thread uses within one piece of work.
#pragma once

#include <cstdint>
#include <memory>

namespace rellax {

// Floats of any values, for one piece of work at a time. Few of them stay with the thread, for its next piece.
class Scratch {
public:
    explicit Scratch(int64_t size) {
        thread_local std::unique_ptr<float[]> kept;
        thread_local int64_t kept_size = 0;
        if (size > kMostKept) {
            own_.reset(new float[size]);
        } else if (size > kept_size) {
            kept.reset(new float[size]);
            kept_size = size;
        }
        data_ = own_ ? own_.get() : kept.get();
    }

    float* data() const { return data_; }

private:
#ifdef RELLAX_SANITIZED
    static constexpr int64_t kMostKept = 0;  // a write past the end is to be seen
#else
    static constexpr int64_t kMostKept = int64_t{1} << 19;
#endif
    std::unique_ptr<float[]> own_;
    float* data_;
};

}  // namespace rellax
