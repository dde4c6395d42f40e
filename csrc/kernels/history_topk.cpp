// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
//
// The queries of a user are one product of their targets with the user's behaviours, tile by tile from packed panels.
// A tile's scores are approximate; of each query, those are kept that the error bound leaves a chance to be among the
// best k, and exact scores of these decide.
#include "history_topk.h"

#include "exact.h"
#include "heap.h"
#include "select.h"
#include "similarity.h"

namespace rellax::RELLAX_LEVEL {
namespace {

constexpr int64_t kStrip = 1024;     // candidates whose scores with a panel of targets are held at once
constexpr int64_t kMostKept = 1024;  // candidates of a query that are kept from strip to strip
constexpr int64_t kLargestK = kMostKept / 2;
constexpr int64_t kMostRanked = 128;  // what ranking each against each pays for
constexpr int64_t kSlack = 16;        // a vector may be written past the last element
constexpr int64_t kStripStride = kStrip + kSlack;
constexpr int64_t kKeptStride = kMostKept + kStrip + kSlack;
constexpr int64_t kGroupQueries = 8 * kPanelRows;  // queries that share the packing of a part of a long history
constexpr int64_t kCachedBytes = 1 << 19;          // rows that stay in a core's cache while a panel is rescored
constexpr float kLargestScore = 0x1p120f;          // within it no sum on the way to a score overflows
static_assert(kStrip % kPanelRows == 0 && kHistoryBlock % kStrip == 0 && kPanelRows % kTileRows == 0);

// Hands out parts of the scratch memory; without memory it only measures.
class Arena {
public:
    explicit Arena(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        const uintptr_t part = memory_ + used_;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(part);
    }

    int64_t used() const { return static_cast<int64_t>(used_); }

private:
    uintptr_t memory_, used_ = 0;
};

// A query on the way.
struct Row {
    Kept kept;
    int64_t rescored;  // how many of them have their exact scores
    float lower;     // at least k of the candidates so far have an approximate score that reaches it
    float error;     // how far an approximate score may be from the exact one
    bool certified;  // else all candidates get their exact scores
};

struct Scratch {
    float* wide;         // rows of up to task.block behaviours in fp32, padded
    Packed* candidates;  // their panels
    Bound* candidate_bounds;
    float* wide_targets;  // one panel's
    Packed* targets;
    Bound* target_bounds;
    float* strip;        // kPanelRows x kStrip
    float* kept_scores;  // kGroupQueries x (kMostKept + kStrip)
    int32_t* kept_positions;
    Row* rows;
    int32_t* ranks;
    float* ranked_scores;
    int32_t* ranked_positions;
    int64_t bytes;

    Scratch(const HistoryTopk& task, void* memory) {
        Arena arena(memory);
        wide = arena.take<float>(task.block * padded(task.dim));
        candidates = arena.take<Packed>(task.block / kPanelRows * panel_size(task.dim));
        candidate_bounds = arena.take<Bound>(task.block);
        wide_targets = arena.take<float>(kPanelRows * padded(task.dim));
        targets = arena.take<Packed>(panel_size(task.dim));
        target_bounds = arena.take<Bound>(kPanelRows);
        strip = arena.take<float>(kPanelRows * kStripStride);
        kept_scores = arena.take<float>(kGroupQueries * kKeptStride);
        kept_positions = arena.take<int32_t>(kGroupQueries * kKeptStride);
        rows = arena.take<Row>(kGroupQueries);
        ranks = arena.take<int32_t>(kMostRanked + kSlack);
        ranked_scores = arena.take<float>(kMostRanked);
        ranked_positions = arena.take<int32_t>(kMostRanked);
        bytes = arena.used();
    }
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The queries of one user, by rising ends.
template <class T>
class UserSearch {
public:
    UserSearch(const HistoryTopk& task, const Scratch& scratch, int64_t user)
        : task_(task),
          scratch_(scratch),
          begin_(task.offsets[user]),
          length_(task.offsets[user + 1] - begin_),
          history_(task.items + begin_) {}

    // Places [first, last) of the task's order.
    void run(int64_t first, int64_t last) {
        longest_ = end(last - 1);
        const int64_t step = longest_ <= task_.block ? kPanelRows : kGroupQueries;
        for (; first < last; first += step) search(first, smaller(step, last - first));
    }

private:
    int64_t query(int64_t place) const { return task_.order == nullptr ? place : task_.order[place]; }

    int64_t end(int64_t place) const { return task_.end == nullptr ? place - begin_ : task_.end[query(place)]; }

    int64_t target(int64_t place) const {
        return task_.target == nullptr ? task_.items[place] : task_.target[query(place)];
    }

    const T* embedding(int64_t item) const { return static_cast<const T*>(task_.embeddings) + item * task_.dim; }

    void search(int64_t first, int64_t count) {
        const int64_t longest = end(first + count - 1);
        for (int64_t row = 0; row < count; ++row) start_row(row);
        if (task_.k <= kLargestK) {
            for (int64_t block = 0; block < longest; block += task_.block) {
                load_candidates(block);
                for (int64_t row = 0; row < count && longest > task_.k; row += kPanelRows) {
                    score_panel(first + row, scratch_.rows + row, smaller(kPanelRows, count - row));
                }
            }
        }
        if (longest_ <= task_.block) {
            finish_cached(first, count);
        } else {
            for (int64_t row = 0; row < count; ++row) finish_far(first + row, scratch_.rows[row]);
        }
    }

    void start_row(int64_t row) {
        const int64_t at = row * kKeptStride;
        const Kept kept{scratch_.kept_scores + at, scratch_.kept_positions + at, 0};
        scratch_.rows[row] = {kept, 0, -__builtin_inff(), 0.0f, true};
    }

    // The behaviours from `block` on, unless they are there already, and one more, which may be a target.
    void load_candidates(int64_t block) {
        if (loaded_from_ == block) return;
        loaded_from_ = block;
        loaded_to_ = smaller(smaller(length_, longest_ + 1), block + task_.block);
        worst_ = {0.0f, 0.0f};
        for (int64_t from = block; from < loaded_to_; from += kPanelRows) {
            const int64_t next = from + kPanelRows;
            prefetch(history_ + next, smaller(kPanelRows, loaded_to_ - next));
            Bound* const bounds = scratch_.candidate_bounds + (from - block);
            load_panel(history_ + from, smaller(kPanelRows, loaded_to_ - from), wide(from), candidate_panel(from), bounds);
            for (int64_t row = 0; row < smaller(kPanelRows, longest_ - from); ++row) worst_ = worse(worst_, bounds[row]);
        }
    }

    // Asks for rows that are read soon: each lies somewhere else in memory.
    void prefetch(const int64_t* items, int64_t count) const {
        constexpr int64_t kLine = 64;
        for (int64_t row = 0; row < count; ++row) {
            const char* const bytes = reinterpret_cast<const char*>(embedding(items[row]));
            const int64_t size = task_.dim * static_cast<int64_t>(sizeof(T));
            for (int64_t at = 0; at < size; at += kLine) __builtin_prefetch(bytes + at, 0, 2);
        }
    }

    // Rows side by side: their fp32 copies are rescored from, out of fewer pages than the table's rows lie in.
    void load_panel(const int64_t* items, int64_t count, float* wide, Packed* panel, Bound* bounds) const {
        const float* rows[kPanelRows];
        for (int64_t row = 0; row < count; ++row) {
            rows[row] = wide + row * padded(task_.dim);
            widen(embedding(items[row]), task_.dim, wide + row * padded(task_.dim));
        }
        if (longest_ > task_.k) pack_panel(rows, static_cast<int>(count), task_.dim, panel, bounds);
    }

    // The larger of either; NaN counts as infinite.
    static Bound worse(Bound a, Bound b) {
        const auto worse = [](float x, float y) { return y <= x ? x : y < __builtin_inff() ? y : __builtin_inff(); };
        return {worse(a.norm, b.norm), worse(a.residual, b.residual)};
    }

    float* wide(int64_t position) const { return scratch_.wide + (position - loaded_from_) * padded(task_.dim); }

    Packed* candidate_panel(int64_t position) const {
        return scratch_.candidates + (position - loaded_from_) / kPanelRows * panel_size(task_.dim);
    }

    // The queries from place `first` on, a panel of them at most, against the packed candidates.
    void score_panel(int64_t first, Row* rows, int64_t count) {
        const int64_t last = smaller(end(first + count - 1), loaded_to_);
        if (last <= loaded_from_) return;
        const Targets targets = target_panel(first, count);
        for (int64_t row = 0; row < count; ++row) bound_error(targets.bounds[row], rows[row]);
        for (int64_t from = loaded_from_; from < last; from += kStrip) {
            const int64_t to = smaller(last, from + kStrip);
            score_strip(targets.panel, first, count, from, to);
            for (int64_t row = 0; row < count; ++row) {
                select(rows[row], end(first + row), scratch_.strip + row * kStripStride, from, to);
            }
        }
    }

    struct Targets {
        const float* wide;
        const Packed* panel;
        const Bound* bounds;
    };

    // The targets as a panel: where they are the behaviours of a panel of candidates, as usual, it serves as both.
    Targets target_panel(int64_t first, int64_t count) {
        const int64_t position = end(first);
        int64_t items[kPanelRows];
        for (int64_t row = 0; row < count; ++row) items[row] = target(first + row);
        bool loaded = position % kPanelRows == 0 && position >= loaded_from_ && position + count <= loaded_to_;
        for (int64_t row = 0; loaded && row < count; ++row) loaded = items[row] == history_[position + row];
        if (loaded) {
            return {wide(position), candidate_panel(position), scratch_.candidate_bounds + (position - loaded_from_)};
        }
        load_panel(items, count, scratch_.wide_targets, scratch_.targets, scratch_.target_bounds);
        return {scratch_.wide_targets, scratch_.targets, scratch_.target_bounds};
    }

    void bound_error(Bound target, Row& row) const {
        row.certified &= (target.norm + target.residual) * (worst_.norm + worst_.residual) < kLargestScore;
        const float error = score_error(target, worst_, task_.dim);
        if (!(error <= row.error)) row.error = error;
    }

    // Candidates [from, to) into the strip; each target only as far as its own tile of targets needs it.
    void score_strip(const Packed* targets, int64_t first, int64_t count, int64_t from, int64_t to) {
        for (int64_t position = from; position < to; position += kPanelRows) {
            const Packed* const panel = candidate_panel(position);
            for (int64_t row = 0; row < count; row += kTileRows) {
                if (end(first + smaller(row + kTileRows, count) - 1) <= position) continue;
                float* const scores = scratch_.strip + row * kStripStride + (position - from);
                score_tile(tile_queries(targets, row), panel, task_.dim, scores, kStripStride);
            }
        }
    }

    // Keeps those of the candidates [from, to) that may be among the best k.
    void select(Row& row, int64_t end, float* scores, int64_t from, int64_t to) {
        const int64_t count = smaller(end, to) - from;
        if (end <= task_.k || count <= 0 || !row.certified) return;
        pad_scores(scores, count);
        if (from == 0) row.lower = kth_lower_bound(scores, count, task_.k);
        row.kept.append(scores, count, from, row.lower - 2.0f * row.error);
        if (row.kept.size > kMostKept) tighten(row);
    }

    void tighten(Row& row) {
        pad_scores(row.kept.scores, row.kept.size);
        row.lower = bisect_kth(row.kept.scores, row.kept.size, task_.k, row.lower);
        row.kept.tighten(row.lower - 2.0f * row.error);
        row.certified = row.kept.size <= kMostKept;
    }

    // Leaves the candidates that exact scores are needed of; false where that is all of them.
    bool settle(int64_t place, Row& row) {
        const int64_t count = end(place);
        if (task_.k > kLargestK || !row.certified) return false;
        if (count > task_.k) {
            tighten(row);
        } else {
            for (int64_t position = 0; position < count; ++position) row.kept.positions[position] = position;
            row.kept.size = count;
        }
        return row.certified;
    }

    // A panel of queries whose candidates are loaded: part by part, so that all of them find its rows in the cache.
    void finish_cached(int64_t first, int64_t count) {
        if (task_.k <= kLargestK && end(first + count - 1) > 0) rescore_panel(first, count);
        for (int64_t row = 0; row < count; ++row) {
            Row& of = scratch_.rows[row];
            if (of.certified && task_.k <= kLargestK) {
                write_best(first + row, of.kept);
            } else {
                search_all(first + row);
            }
        }
    }

    void rescore_panel(int64_t first, int64_t count) {
        const int64_t longest = end(first + count - 1), stride = padded(task_.dim);
        const float* const targets = target_panel(first, count).wide;
        for (int64_t row = 0; row < count; ++row) scratch_.rows[row].certified = settle(first + row, scratch_.rows[row]);
        const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(float));
        const int64_t part = row_bytes < kCachedBytes ? kCachedBytes / row_bytes : 1;
        for (int64_t from = 0; from < longest; from += part) {
            for (int64_t row = 0; row < count; ++row) {
                Row& of = scratch_.rows[row];
                if (of.certified) rescore(of, from + part, targets + row * stride, [&](int64_t at) { return wide(at); });
            }
        }
    }

    // Exact scores in place of the approximate ones, of the candidates before `to`.
    template <class RowAt>
    void rescore(Row& row, int64_t to, const float* target, RowAt row_at) const {
        const int32_t* const positions = row.kept.positions;
        int64_t from = row.rescored, last = from;
        while (last < row.kept.size && positions[last] < to) ++last;
        row.rescored = last;
        for (; from < last; from += kExactRows) {
            decltype(row_at(0)) rows[kExactRows];
            float exact[kExactRows];
            for (int64_t i = 0; i < kExactRows; ++i) rows[i] = row_at(positions[smaller(from + i, last - 1)]);
            exact_scores(target, rows, task_.dim, exact);
            for (int64_t i = 0; i < smaller(kExactRows, last - from); ++i) row.kept.scores[from + i] = exact[i];
        }
    }

    // A query whose candidates were loaded one block after the other.
    void finish_far(int64_t place, Row& row) {
        if (!settle(place, row)) return search_all(place);
        widen(embedding(target(place)), task_.dim, scratch_.wide_targets);
        rescore(row, end(place), scratch_.wide_targets, [&](int64_t at) { return embedding(history_[at]); });
        write_best(place, row.kept);
    }

    void write_best(int64_t place, const Kept& kept) const {
        const int64_t output = query(place) * task_.k;
        float* const scores = task_.scores + output;
        int64_t* const positions = task_.positions + output;
        if (kept.size > kMostRanked || !all_finite(kept.scores, kept.size)) {
            Best best(task_.k, scores, positions);
            for (int64_t i = kept.size - 1; i >= 0; --i) best.offer(kept.scores[i], kept.positions[i]);
            return best.finish();
        }
        pad_scores(kept.scores, kept.size);
        rank(kept.scores, kept.size, scratch_.ranks);
        for (int64_t i = 0; i < kept.size; ++i) {
            scratch_.ranked_scores[scratch_.ranks[i]] = kept.scores[i];
            scratch_.ranked_positions[scratch_.ranks[i]] = kept.positions[i];
        }
        const int64_t found = smaller(kept.size, task_.k);
        for (int64_t i = 0; i < found; ++i) {
            scores[i] = scratch_.ranked_scores[i];
            positions[i] = scratch_.ranked_positions[i];
        }
        for (int64_t i = found; i < task_.k; ++i) {
            scores[i] = -__builtin_inff();
            positions[i] = -1;
        }
    }

    // The exact score of every candidate.
    void search_all(int64_t place) const {
        const int64_t count = end(place), output = query(place) * task_.k;
        float* const target_row = scratch_.wide_targets;
        widen(embedding(target(place)), task_.dim, target_row);
        Best best(task_.k, task_.scores + output, task_.positions + output);
        for (int64_t last = count; last > 0; last -= kExactRows) {
            const T* rows[kExactRows];
            float exact[kExactRows];
            for (int64_t row = 0; row < kExactRows; ++row) {
                rows[row] = embedding(history_[last - 1 - smaller(row, last - 1)]);
            }
            exact_scores(target_row, rows, task_.dim, exact);
            for (int64_t row = 0; row < smaller(kExactRows, last); ++row) best.offer(exact[row], last - 1 - row);
        }
        best.finish();
    }

    const HistoryTopk& task_;
    const Scratch& scratch_;
    const int64_t begin_, length_;
    const int64_t* const history_;
    int64_t longest_ = 0;
    int64_t loaded_from_ = -1, loaded_to_ = -1;
    Bound worst_{};  // of the packed candidates
};

// The user of a place where every behaviour is a target.
int64_t user_at(const HistoryTopk& task, int64_t place) {
    int64_t low = 0, high = task.users;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (task.offsets[middle] <= place ? low : high) = middle;
    }
    return low;
}

template <class T>
void run(const HistoryTopk& task, int64_t first, int64_t last, const Scratch& scratch) {
    const auto user_of = [&](int64_t place) {
        return task.user == nullptr ? user_at(task, place) : task.user[task.order == nullptr ? place : task.order[place]];
    };
    while (first < last) {
        const int64_t user = user_of(first);
        int64_t next = first + 1;
        if (task.user == nullptr) next = smaller(task.offsets[user + 1], last);
        while (task.user != nullptr && next < last && user_of(next) == user) ++next;
        UserSearch<T>(task, scratch, user).run(first, next);
        first = next;
    }
}

}  // namespace

int64_t history_topk_scratch(const HistoryTopk& task) { return Scratch(task, nullptr).bytes; }

void history_topk(const HistoryTopk& task, int64_t first, int64_t last, void* memory) {
    const Scratch scratch(task, memory);
    switch (task.dtype) {
        case Dtype::float32: return run<float>(task, first, last, scratch);
        case Dtype::bfloat16: return run<BFloat16>(task, first, last, scratch);
        case Dtype::float16: return run<Float16>(task, first, last, scratch);
    }
}

}  // namespace rellax::RELLAX_LEVEL
