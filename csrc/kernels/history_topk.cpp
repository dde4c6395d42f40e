// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "history_topk.h"

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

// How many queries of one user share a pass over the candidates: as many as their sums fit in registers.
#if defined(__AVX512F__)
constexpr int kBlock = 8;
#elif defined(__AVX2__)
constexpr int kBlock = 4;
#else
constexpr int kBlock = 2;
#endif
constexpr int kVectors = kLanes / kWidth;
static_assert(kBlock <= kMaxBlock);

// Sums of `kRows` targets against one candidate: lane l of a sum takes the elements l, l + kLanes, ...
template <int kRows>
struct Sums {
    Floats at[kRows][kVectors] = {};

    template <class T>
    void add(const float* targets, int64_t stride, const T* candidate) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const Floats values = load(candidate + vector * kWidth);
            for (int row = 0; row < kRows; ++row) {
                at[row][vector] += load(targets + row * stride + vector * kWidth) * values;
            }
        }
    }

    float total(int row) const {
        float lanes[kLanes];
        __builtin_memcpy(lanes, at[row], sizeof lanes);
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
        }
        return lanes[0];
    }
};

// `targets` has rows of padded(dim) floats, zero past dim.
template <int kRows, class T>
inline Sums<kRows> multiply(const float* targets, const T* candidate, int64_t dim) {
    const int64_t stride = padded(dim);
    Sums<kRows> sums;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) sums.add(targets + d, stride, candidate + d);
    if (d < dim) {
        T rest[kLanes] = {};
        __builtin_memcpy(rest, candidate + d, (dim - d) * sizeof(T));
        sums.add(targets + d, stride, rest);
    }
    return sums;
}

template <class T>
void widen(const T* row, int64_t dim, float* out) {
    T rest[kLanes] = {};
    for (int64_t d = 0; d < dim; d += kLanes) {
        const bool whole = d + kLanes <= dim;
        if (!whole) __builtin_memcpy(rest, row + d, (dim - d) * sizeof(T));
        for (int lane = 0; lane < kLanes; lane += kWidth) {
            store(out + d + lane, load((whole ? row + d : rest) + lane));
        }
    }
}

// The best k of a query, kept in its rows of the output: a heap with the worst at its root, sorted by finish().
class Best {
public:
    void start(int64_t k, float* scores, int64_t* positions) {
        k_ = k;
        size_ = 0;
        all_finite_ = true;
        scores_ = scores;
        positions_ = positions;
    }

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

    int64_t k_, size_;
    bool all_finite_;
    float* scores_;
    int64_t* positions_;
};

// The kRows queries from `query` on, all of one user.
template <int kRows, class T>
void search(const HistoryTopk& task, int64_t query, float* targets) {
    const T* embeddings = static_cast<const T*>(task.embeddings);
    const int64_t* history = task.items + task.offsets[task.user[query]];
    const int64_t* end = task.end + query;
    Best best[kRows];
    int64_t longest = 0;
    for (int row = 0; row < kRows; ++row) {
        widen(embeddings + task.target[query + row] * task.dim, task.dim, targets + row * padded(task.dim));
        best[row].start(task.k, task.scores + (query + row) * task.k, task.positions + (query + row) * task.k);
        if (end[row] > longest) longest = end[row];
    }
    for (int64_t position = longest - 1; position >= 0; --position) {
        const T* candidate = embeddings + history[position] * task.dim;
        const Sums<kRows> sums = multiply<kRows>(targets, candidate, task.dim);
        for (int row = 0; row < kRows; ++row) {
            if (position < end[row]) best[row].offer(sums.total(row), position);
        }
    }
    for (int row = 0; row < kRows; ++row) best[row].finish();
}

template <class T>
void run(const HistoryTopk& task, int64_t first, int64_t last, float* scratch) {
    for (int64_t query = first; query < last;) {
        int64_t same = 1;
        while (same < kBlock && query + same < last && task.user[query + same] == task.user[query]) ++same;
        if (same == kBlock) {
            search<kBlock, T>(task, query, scratch);
            query += kBlock;
        } else {
            search<1, T>(task, query, scratch);
            query += 1;
        }
    }
}

}  // namespace

void history_topk(const HistoryTopk& task, int64_t first, int64_t last, float* scratch) {
    switch (task.dtype) {
        case Dtype::float32: return run<float>(task, first, last, scratch);
        case Dtype::bfloat16: return run<BFloat16>(task, first, last, scratch);
        case Dtype::float16: return run<Float16>(task, first, last, scratch);
    }
}

}  // namespace rellax::RELLAX_LEVEL
