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
          lowers_(scratch),
          target_(scratch + lists.capacity + kItemTopkPad) {}

    void offer(float score, float error, int64_t item) {
        candidates_[size_++] = {score - error, score + error, static_cast<uint32_t>(item)};
        if (size_ < capacity_) return;
        narrow();
        const int64_t room = capacity_ - size_, most = capacity_ - task_.k;
        if (8 * room < 3 * most) settle();
    }

    // Drops what is sure not to be among the k best.
    void narrow() {
        if (size_ <= task_.k) return;
        for (int64_t i = 0; i < size_; ++i) lowers_[i] = candidates_[i].lower;
        pad_scores(lowers_, size_);
        const float floor = bisect_kth(lowers_, size_, task_.k);
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

    // Whether, after settle, the floor has left out none of the k best.
    bool complete() const {
        if (floor_ == -__builtin_inff()) return true;
        for (int64_t i = 0; i < size_; ++i) {
            if (candidates_[i].lower < floor_) return false;
        }
        return size_ == task_.k;
    }

    // Looks at every item's score.
    void start_over() {
        const T* const embeddings = static_cast<const T*>(task_.embeddings);
        const int64_t own = item_of(task_, row_);
        widen(embeddings + own * task_.dim, task_.dim, target_);
        floor_ = -__builtin_inff();
        size_ = 0;
        for (int64_t first = 0; first < task_.items; first += kExactRows) {
            const int64_t count = smaller(task_.items - first, kExactRows);
            const T* rows[kExactRows];
            for (int64_t i = 0; i < kExactRows; ++i) rows[i] = embeddings + (first + (i < count ? i : 0)) * task_.dim;
            float scores[kExactRows];
            exact_scores(target_, rows, task_.dim, scores);
            for (int64_t i = 0; i < count; ++i) {
                const bool allowed = !task_.exclude_self || first + i != own;
                if (allowed && scores[i] >= floor_) offer(scores[i], 0, first + i);
            }
        }
        settle();
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
        widen(embeddings + item_of(task_, row_) * task_.dim, task_.dim, target_);
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
            for (int64_t next = first; next < smaller(last, first + kExactRows); ++next) {
                const T* const row = embeddings + candidates_[next].item * task_.dim;
                prefetch_bytes(row, task_.dim * static_cast<int64_t>(sizeof(T)));
            }
            float scores[kExactRows];
            exact_scores(target_, rows, task_.dim, scores);
            for (int i = 0; i < count; ++i) unknown[i]->lower = unknown[i]->upper = scores[i];
        }
    }

    const ItemTopk& task_;
    const int64_t capacity_, row_;
    float& floor_;
    int32_t& size_;
    Candidate* const candidates_;
    float* const lowers_;
    float* const target_;  // the query's row in fp32
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

// How far a score of the query may be off, whatever the item.
inline float error_of(const PackedRows& queries, int64_t row, Reach items) {
    return queries.norm[row] * items.error + queries.error[row] * items.norm;
}

inline const Packed* panel(const PackedRows& rows, int64_t row, int64_t dim) {
    return static_cast<const Packed*>(rows.panels) + row / kPanelRows * panel_size(dim);
}

// Products of queries with some items, and what they are to the lists.
template <class T>
class Strip {
public:
    static constexpr int64_t kColumns = 512;

    Strip(const ItemTopk& task, const ItemTopkBlock& block, int64_t column, float* scratch)
        : task_(task),
          block_(block),
          column_(column),
          columns_(smaller(block.columns.last - column, kColumns)),
          items_(reach_of(block.items, column, columns_)),
          scratch_(scratch) {}

    // A panel of queries, from `row` on, with the items from `column` on.
    void match(int64_t row, int64_t column) {
        find_what_is_enough(row);
        const int64_t rows = smaller(block_.rows.last - row, kPanelRows);
        for (int64_t j = column - column_; j < columns_; j += kPanelRows) {
            const bool mutual = block_.mutual && column_ + j != row;
            for (int64_t i = 0; i < rows; i += kTileRows) {
                alignas(64) float scores[kTileRows * kPanelRows];
                score_tile(tile_queries(queries(row), i), items(j), task_.dim, scores, kPanelRows);
                offer(row + i, smaller(rows - i, kTileRows), j, scores, mutual);
            }
        }
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

private:
    const Packed* queries(int64_t row) const { return panel(block_.queries, row, task_.dim); }
    const Packed* items(int64_t j) const { return panel(block_.items, column_ + j, task_.dim); }
    float error(int64_t row) const { return error_of(block_.queries, row, items_); }

    // Scores from which on a product may be of use: for a query's list, and for an item's, whatever the other side is.
    void find_what_is_enough(int64_t row) {
        for (int64_t i = 0; i < kPanelRows; ++i) enough_[i] = block_.lists.floor[row + i] - error(row + i);
        const Reach queries = reach_of(block_.queries, row, kPanelRows);
        for (int64_t j = 0; block_.mutual && j < columns_; j += kWidth) {
            const Floats norm = load(block_.items.norm + column_ + j), error = load(block_.items.error + column_ + j);
            const Floats floor = load(block_.lists.floor + column_ + j);
            store(enough_for_item_ + j, floor - (queries.error * norm + queries.norm * error));
        }
    }

    // Offers a tile's scores to the lists that they may be of use for.
    void offer(int64_t row, int64_t rows, int64_t j, const float* scores, bool mutual) {
        Floats enough_for_item[kPanelVectors];
        for (int part = 0; part < kPanelVectors; ++part) {
            enough_for_item[part] = mutual ? load(enough_for_item_ + j + part * kWidth) : Floats{} + __builtin_inff();
        }
        for (int64_t i = 0; i < rows; ++i, scores += kPanelRows) {
            const Floats enough = Floats{} + enough_[row % kPanelRows + i];
            uint32_t useful = 0;
            for (int part = 0; part < kPanelVectors; ++part) {
                const Floats values = load(scores + part * kWidth);
                useful |= (at_least(values, enough) | at_least(values, enough_for_item[part])) << part * kWidth;
            }
            for (; useful != 0; useful &= useful - 1) {
                const int at = __builtin_ctz(useful);
                find(row + i, column_ + j + at, scores[at], mutual);
            }
        }
    }

    // Notes a product for those of its two lists that it may be of use for; the processor could not guess which.
    void find(int64_t row, int64_t column, float score, bool mutual) {
        const int64_t item = block_.first_item + column;
        const float error = block_.queries.error[row] * block_.items.norm[column] +
                            block_.queries.norm[row] * block_.items.error[column];
        const bool other = !task_.exclude_self || item != item_of(task_, row);
        note(row, score, error, item, other);
        note(mutual ? item : row, score, error, row, mutual);
        if (count_ > kFound - 2) hand_over();
    }

    void note(int64_t row, float score, float error, int64_t item, bool allowed) {
        found_[count_] = {score, error, static_cast<uint32_t>(row), static_cast<uint32_t>(item)};
        count_ += allowed & (score + error >= block_.lists.floor[row]);
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
    float enough_[kPanelRows], enough_for_item_[kColumns];
};

template <class T>
void match_rows(const ItemTopk& task, const ItemTopkBlock& block, float* scratch) {
    const bool with_itself = block.mutual && block.rows.first == block.columns.first;
    for (int64_t column = block.columns.first; column < block.columns.last; column += Strip<T>::kColumns) {
        Strip<T> strip(task, block, column, scratch);
        for (int64_t row = block.rows.first; row < block.rows.last; row += kPanelRows) {
            strip.match(row, with_itself && row > column ? row : column);
        }
        strip.hand_over();
    }
}

void start(const ItemTopk& task, PackedRows queries, RowRange rows, const Sample& sample, const Shortlists& lists) {
    constexpr int kSteps = 10;  // more than elsewhere: what a floor lets pass costs more than a step
    const Reach reach = reach_of(sample.items, 0, kSampled);
    for (int64_t row = rows.first; row < rows.last; row += kTileRows) {
        alignas(64) float scores[kTileRows * kSampled];
        const Packed* const tile = tile_queries(panel(queries, row, task.dim), row % kPanelRows);
        for (int64_t j = 0; j < kSampled; j += kPanelRows) {
            score_tile(tile, panel(sample.items, j, task.dim), task.dim, scores + j, kSampled);
        }
        for (int64_t i = 0; i < smaller(rows.last - row, kTileRows); ++i) {
            const float reached = bisect_kth(scores + i * kSampled, kSampled, sample.rank, -__builtin_inff(), kSteps);
            const float floor = reached - error_of(queries, row + i, reach);
            if (floor > lists.floor[row + i]) lists.floor[row + i] = floor;
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
        if (!list.complete()) list.start_over();
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

extern const ItemTopkKernels item_topk = {kPanelRows, panel_bytes, pack, start, match, settle};

}  // namespace rellax::RELLAX_LEVEL
