// The best k of any number of candidates, for the queries that selection by threshold can't serve. Included by the
// kernels inside their level's compilation only, in that level's namespace.
#pragma once

#include <cstdint>

namespace rellax::RELLAX_LEVEL {
namespace {

// The best k of a query, kept in its rows of the output: a heap with the worst at its root, sorted by finish().
class Best {
public:
    Best(int64_t k, float* scores, int64_t* positions) : k_(k), scores_(scores), positions_(positions) {}

    // Candidates come from the most recent to the oldest, so that an equal score never displaces one.
    void offer(float score, int64_t position) {
        all_finite_ &= score - score == 0.0f;
        if (size_ < k_) {
            put(size_++, score, position);
            if (size_ == k_) heapify();
        } else if (score > scores_[0]) {
            put(0, score, position);
            sink(0, size_);
        }
    }

    void finish() {
        if (size_ < k_) heapify();
        for (int64_t last = size_ - 1; last > 0; --last) {
            const float score = scores_[0];
            const int64_t position = positions_[0];
            put(0, scores_[last], positions_[last]);
            put(last, score, position);
            sink(0, last);
        }
        for (int64_t slot = size_; slot < k_; ++slot) put(slot, -__builtin_inff(), -1);
        if (!all_finite_) scores_[0] = __builtin_nanf("");
    }

private:
    void put(int64_t slot, float score, int64_t position) {
        scores_[slot] = score;
        positions_[slot] = position;
    }

    bool worse(int64_t a, int64_t b) const {
        return scores_[a] < scores_[b] || (scores_[a] == scores_[b] && positions_[a] < positions_[b]);
    }

    void heapify() {
        for (int64_t root = size_ / 2 - 1; root >= 0; --root) sink(root, size_);
    }

    void sink(int64_t root, int64_t size) {
        for (int64_t child; (child = 2 * root + 1) < size;) {
            if (child + 1 < size && worse(child + 1, child)) ++child;
            if (!worse(child, root)) return;
            const float score = scores_[root];
            const int64_t position = positions_[root];
            put(root, scores_[child], positions_[child]);
            put(child, score, position);
            root = child;
        }
    }

    int64_t k_, size_ = 0;
    bool all_finite_ = true;
    float* scores_;
    int64_t* positions_;
};

}  // namespace
}  // namespace rellax::RELLAX_LEVEL
