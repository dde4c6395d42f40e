// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "item_topk.h"

#include "exact.h"
#include "select.h"
#include "similarity.h"

namespace rellax::RELLAX_LEVEL {
namespace {

// Bit i says whether a[i] >= b[i].
inline uint32_t at_least(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)(a >= b));
#else
    const Integers comparison = a >= b;
    uint32_t mask = 0;
    for (int lane = 0; lane < kWidth; ++lane) mask |= (comparison[lane] & 1u) << lane;
    return mask;
#endif
}

// The item of a query.
inline int64_t item_of(const ItemTopk& task, int64_t row) { return task.query == nullptr ? row : task.query[row]; }

inline bool better(const Candidate& a, const Candidate& b) {
    return a.lower > b.lower || (a.lower == b.lower && a.item < b.item);
}

inline void swap(Candidate& a, Candidate& b) {
    const Candidate old = a;
    a = b;
    b = old;
}

// Puts the k best of `size` > k candidates in front (Hoare's selection).
void select_best(Candidate* candidates, int64_t size, int64_t k) {
    for (int64_t first = 0, last = size - 1; first < last;) {
        const Candidate pivot = candidates[first + (last - first) / 2];
        int64_t i = first, j = last;
        while (i <= j) {
            while (better(candidates[i], pivot)) ++i;
            while (better(pivot, candidates[j])) --j;
            if (i <= j) swap(candidates[i++], candidates[j--]);
        }
        if (k <= j) {
            last = j;
        } else if (k >= i) {
            first = i;
        } else {
            return;
        }
    }
}

// The shortlist of one query.
template <class T>
class Shortlist {
public:
    Shortlist(const ItemTopk& task, const Shortlists& lists, int64_t row, float* scratch)
        : task_(task),
          capacity_(lists.capacity),
          row_(row),
          floor_(lists.floor[row]),
          size_(lists.size[row]),
          candidates_(lists.candidates + row * lists.capacity),
          scratch_(scratch) {}

    void offer(float score, float error, int64_t item) {
        candidates_[size_++] = {score - error, score + error, static_cast<uint32_t>(item)};
        if (size_ < capacity_) return;
        narrow();
        if (2 * size_ > capacity_ + task_.k) settle();
    }

    // Drops what is sure not to be among the k best.
    void narrow() {
        if (size_ <= task_.k) return;
        for (int64_t i = 0; i < size_; ++i) scratch_[i] = candidates_[i].lower;
        pad_scores(scratch_, size_);
        const float floor = bisect_kth(scratch_, size_, task_.k);
        if (floor > floor_) floor_ = floor;
        drop();
    }

    // Computes the scores and leaves the k best.
    void settle() {
        if (size_ <= task_.k) return score(0, size_);
        select_best(candidates_, size_, task_.k);
        score(0, task_.k);
        raise_floor();
        drop();
        score(task_.k, size_);
        if (size_ <= task_.k) return;
        select_best(candidates_, size_, task_.k);
        size_ = static_cast<int32_t>(task_.k);
        raise_floor();
    }

private:
    // Drops those whose score is below the floor.
    void drop() {
        int32_t kept = 0;
        for (int64_t i = 0; i < size_; ++i) {
            candidates_[kept] = candidates_[i];
            kept += candidates_[i].upper >= floor_;
        }
        size_ = kept;
    }

    // The first k are known to reach the smallest of their scores.
    void raise_floor() {
        float least = candidates_[0].lower;
        for (int64_t i = 1; i < task_.k; ++i) least = candidates_[i].lower < least ? candidates_[i].lower : least;
        if (least > floor_) floor_ = least;
    }

    // Computes the scores of candidates [first, last).
    void score(int64_t first, int64_t last) {
        const T* const embeddings = static_cast<const T*>(task_.embeddings);
        float* const target = scratch_;
        widen(embeddings + item_of(task_, row_) * task_.dim, task_.dim, target);
        while (first < last) {
            Candidate* unknown[kExactRows];
            const T* rows[kExactRows];
            int count = 0;
            for (; first < last && count < kExactRows; ++first) {
                if (candidates_[first].lower == candidates_[first].upper) continue;
                unknown[count] = candidates_ + first;
                rows[count++] = embeddings + candidates_[first].item * task_.dim;
            }
            if (count == 0) return;
            for (int rest = count; rest < kExactRows; ++rest) rows[rest] = rows[0];
            float scores[kExactRows];
            exact_scores(target, rows, task_.dim, scores);
            for (int i = 0; i < count; ++i) unknown[i]->lower = unknown[i]->upper = scores[i];
        }
    }

    const ItemTopk& task_;
    const int64_t capacity_, row_;
    float& floor_;
    int32_t& size_;
    Candidate* const candidates_;
    float* const scratch_;
};

// The largest of what `count` > 0 rows have; those that only fill up their panel have nothing.
struct Reach {
    float norm, error;
};

inline Reach reach_of(const PackedRows& rows, int64_t first, int64_t count) {
    Floats norm = {}, error = {};
    for (int64_t row = first; row < first + count; row += kWidth) {
        norm = larger(load(rows.norm + row), norm);
        error = larger(load(rows.error + row), error);
    }
    return {range_of((const float*)&norm, kWidth).high, range_of((const float*)&error, kWidth).high};
}

// Products of a panel of queries with some items, and what they are to the lists.
template <class T>
class Strip {
public:
    static constexpr int64_t kColumns = 512;

    Strip(const ItemTopk& task, const ItemTopkBlock& block, int64_t column, float* scratch)
        : task_(task),
          block_(block),
          column_(column),
          columns_(block.columns.last - column < kColumns ? block.columns.last - column : kColumns),
          items_(reach_of(block.items, column, columns_)),
          scratch_(scratch) {
        for (float& enough : enough_for_item_) enough = __builtin_inff();
    }

    // Scores the panel's queries, from `row` on.
    void score(int64_t row) {
        const int64_t size = panel_size(task_.dim);
        const Packed* const queries = static_cast<const Packed*>(block_.queries.panels) + row / kPanelRows * size;
        const Packed* panel = static_cast<const Packed*>(block_.items.panels) + column_ / kPanelRows * size;
        for (int64_t j = 0; j < columns_; j += kPanelRows, panel += size) {
            for (int i = 0; i < kPanelRows; i += kTileRows) {
                score_tile(tile_queries(queries, i), panel, task_.dim, scores_ + i * kColumns + j, kColumns);
            }
        }
    }

    // Offers the scores to the lists that they may be of use for. Bounds that hold for a whole strip find those; each
    // is then looked at by its own.
    void offer(int64_t row) {
        const Reach queries = reach_of(block_.queries, row, kPanelRows);
        for (int64_t j = 0; block_.mutual && j < columns_; j += kWidth) {
            const Floats norm = load(block_.items.norm + column_ + j), error = load(block_.items.error + column_ + j);
            const Floats floor = load(block_.lists.floor + column_ + j);
            store(enough_for_item_ + j, floor - (queries.error * norm + queries.norm * error));
        }
        const int64_t last = row + kPanelRows < block_.rows.last ? row + kPanelRows : block_.rows.last;
        for (float* scores = scores_; row < last; ++row, scores += kColumns) {
            const float error = block_.queries.norm[row] * items_.error + block_.queries.error[row] * items_.norm;
            if (block_.lists.size[row] == 0) raise_floor(row, scores, error);
            const Floats enough = Floats{} + (block_.lists.floor[row] - error);
            for (int64_t j = 0; j < columns_; j += kPanelRows) {
                uint32_t useful = 0;
                for (int part = 0; part < kPanelRows; part += kWidth) {
                    const Floats values = load(scores + j + part);
                    const Floats enough_for_item = load(enough_for_item_ + j + part);
                    useful |= (at_least(values, enough) | at_least(values, enough_for_item)) << part;
                }
                for (; useful != 0; useful &= useful - 1) find(row, j + __builtin_ctz(useful), scores);
            }
        }
        hand_over();
    }

private:
    // A start for an empty list: there are k items with these scores or better.
    void raise_floor(int64_t row, float* scores, float error) {
        const int64_t k = task_.k + task_.exclude_self;
        if (columns_ < k) return;
        pad_scores(scores, columns_);
        const float floor = kth_lower_bound(scores, columns_, k) - error;
        if (floor > block_.lists.floor[row]) block_.lists.floor[row] = floor;
    }

    void find(int64_t row, int64_t j, const float* scores) {
        const int64_t column = column_ + j, item = block_.first_item + column;
        const float error = block_.queries.error[row] * block_.items.norm[column] +
                            block_.queries.norm[row] * block_.items.error[column];
        find(row, scores[j], error, item);
        if (block_.mutual) find(item, scores[j], error, row);
    }

    void find(int64_t row, float score, float error, int64_t item) {
        if (!(score + error >= block_.lists.floor[row])) return;
        if (task_.exclude_self && item == item_of(task_, row)) return;
        found_[count_++] = {score, error, static_cast<uint32_t>(row), static_cast<uint32_t>(item)};
        if (count_ == kFound) hand_over();
    }

    // The lists are far from the core: what was found goes to them in bulk, so that they can be fetched ahead.
    void hand_over() {
        const Shortlists& lists = block_.lists;
        for (int64_t i = 0; i < count_ + kAhead; ++i) {
            if (i < count_) {
                const uint32_t row = found_[i].row;
                __builtin_prefetch(lists.candidates + row * lists.capacity + lists.size[row], 1);
            }
            if (i < kAhead) continue;
            const Found& found = found_[i - kAhead];
            Shortlist<T>(task_, lists, found.row, scratch_).offer(found.score, found.error, found.item);
        }
        count_ = 0;
    }

    // A product that may be of use for the list of query `row`.
    struct Found {
        float score, error;
        uint32_t row, item;
    };
    static constexpr int64_t kFound = 512, kAhead = 32;

    const ItemTopk& task_;
    const ItemTopkBlock& block_;
    const int64_t column_, columns_;
    const Reach items_;
    float* const scratch_;
    Found found_[kFound];
    int64_t count_ = 0;
    float enough_for_item_[kColumns];
    alignas(64) float scores_[kPanelRows * kColumns];
};

template <class T>
void match_rows(const ItemTopk& task, const ItemTopkBlock& block, float* scratch) {
    for (int64_t column = block.columns.first; column < block.columns.last; column += Strip<T>::kColumns) {
        Strip<T> strip(task, block, column, scratch);
        for (int64_t row = block.rows.first; row < block.rows.last; row += kPanelRows) {
            strip.score(row);
            strip.offer(row);
        }
    }
}

template <class T>
void pack_rows(const ItemTopk& task, const int64_t* item, RowRange rows, const PackedRows& packed) {
    const T* const embeddings = static_cast<const T*>(task.embeddings);
    for (int64_t first = rows.first; first < rows.last; first += kPanelRows) {
        const int count = static_cast<int>(smaller(rows.last - first, kPanelRows));
        const T* sources[kPanelRows];
        for (int i = 0; i < count; ++i) {
            sources[i] = embeddings + (item == nullptr ? first + i : item[first + i]) * task.dim;
        }
        const int64_t place = first - rows.first;
        Bound bounds[kPanelRows];
        Packed* const panel = static_cast<Packed*>(packed.panels) + place / kPanelRows * panel_size(task.dim);
        pack_panel(sources, count, task.dim, panel, bounds);
        // score_error, as a sum of two products.
        const float rounding = static_cast<float>(task.dim + 32) * 0x1p-23f;
        const float least = static_cast<float>(task.dim) * 0x1p-60f;
        for (int i = 0; i < kPanelRows; ++i) {
            const float norm = bounds[i].norm + bounds[i].residual;
            packed.norm[place + i] = norm + 0x1p-60f;
            const float error = 1.001f * (bounds[i].residual + rounding * norm) + least;
            packed.error[place + i] = i < count ? error : __builtin_nanf("");
        }
    }
}

template <class T>
void settle_rows(const ItemTopk& task, RowRange rows, const Shortlists& lists, float* scratch) {
    for (int64_t row = rows.first; row < rows.last; ++row) {
        Shortlist<T> list(task, lists, row, scratch);
        list.narrow();
        list.settle();
    }
}

int64_t panel_bytes(int64_t dim) { return panel_size(dim) * sizeof(Packed); }

void pack(const ItemTopk& task, const int64_t* item, RowRange rows, const PackedRows& packed) {
    with_type(task.dtype, [&](auto type) { pack_rows<decltype(type)>(task, item, rows, packed); });
}

void match(const ItemTopk& task, const ItemTopkBlock& block, float* scratch) {
    with_type(task.dtype, [&](auto type) { match_rows<decltype(type)>(task, block, scratch); });
}

void settle(const ItemTopk& task, RowRange rows, const Shortlists& lists, float* scratch) {
    with_type(task.dtype, [&](auto type) { settle_rows<decltype(type)>(task, rows, lists, scratch); });
}

}  // namespace

extern const ItemTopkKernels item_topk = {kPanelRows, panel_bytes, pack, match, settle};

}  // namespace rellax::RELLAX_LEVEL
