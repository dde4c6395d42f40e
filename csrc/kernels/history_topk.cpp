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
    float lower;     // at least k of the candidates so far have an approximate score that reaches it
    float error;     // how far an approximate score may be from the exact one
    bool certified;  // else all candidates get their exact scores
};

struct Scratch {
    Packed* candidates;  // panels of up to task.block behaviours
    Bound* candidate_bounds;
    Packed* targets;  // one panel
    Bound* target_bounds;
    float* strip;        // kPanelRows x kStrip
    float* kept_scores;  // kGroupQueries x (kMostKept + kStrip)
    int32_t* kept_positions;
    Row* rows;
    float* target;  // widened
    int32_t* ranks;
    float* ranked_scores;
    int32_t* ranked_positions;
    int64_t bytes;

    Scratch(const HistoryTopk& task, void* memory) {
        Arena arena(memory);
        candidates = arena.take<Packed>(task.block / kPanelRows * panel_size(task.dim));
        candidate_bounds = arena.take<Bound>(task.block);
        targets = arena.take<Packed>(panel_size(task.dim));
        target_bounds = arena.take<Bound>(kPanelRows);
        strip = arena.take<float>(kPanelRows * kStripStride);
        kept_scores = arena.take<float>(kGroupQueries * kKeptStride);
        kept_positions = arena.take<int32_t>(kGroupQueries * kKeptStride);
        rows = arena.take<Row>(kGroupQueries);
        target = arena.take<float>(padded(task.dim));
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
        if (longest > task_.k && task_.k <= kLargestK) {
            for (int64_t block = 0; block < longest; block += task_.block) {
                pack_candidates(block);
                for (int64_t row = 0; row < count; row += kPanelRows) {
                    score_panel(first + row, scratch_.rows + row, smaller(kPanelRows, count - row));
                }
            }
        }
        for (int64_t row = 0; row < count; ++row) finish_row(first + row, scratch_.rows[row]);
    }

    void start_row(int64_t row) {
        const int64_t at = row * kKeptStride;
        const Kept kept{scratch_.kept_scores + at, scratch_.kept_positions + at, 0};
        scratch_.rows[row] = {kept, -__builtin_inff(), 0.0f, true};
    }

    // The behaviours from `block` on, unless they are packed already, and one more, which may be a target.
    void pack_candidates(int64_t block) {
        if (packed_from_ == block) return;
        packed_from_ = block;
        packed_to_ = smaller(smaller(length_, longest_ + 1), block + task_.block);
        worst_ = {0.0f, 0.0f};
        for (int64_t from = block; from < packed_to_; from += kPanelRows) {
            Bound* const bounds = scratch_.candidate_bounds + (from - block);
            const int64_t next = from + kPanelRows;
            prefetch(history_ + next, smaller(kPanelRows, packed_to_ - next));
            pack(history_ + from, smaller(kPanelRows, packed_to_ - from), candidate_panel(from), bounds);
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

    void pack(const int64_t* items, int64_t count, Packed* panel, Bound* bounds) const {
        const T* rows[kPanelRows];
        for (int64_t row = 0; row < count; ++row) rows[row] = embedding(items[row]);
        pack_panel(rows, static_cast<int>(count), task_.dim, panel, bounds);
    }

    // The larger of either; NaN counts as infinite.
    static Bound worse(Bound a, Bound b) {
        const auto worse = [](float x, float y) { return y <= x ? x : y < __builtin_inff() ? y : __builtin_inff(); };
        return {worse(a.norm, b.norm), worse(a.residual, b.residual)};
    }

    Packed* candidate_panel(int64_t position) const {
        return scratch_.candidates + (position - packed_from_) / kPanelRows * panel_size(task_.dim);
    }

    // The queries from place `first` on, a panel of them at most, against the packed candidates.
    void score_panel(int64_t first, Row* rows, int64_t count) {
        const int64_t last = smaller(end(first + count - 1), packed_to_);
        if (last <= packed_from_) return;
        const Targets targets = target_panel(first, count);
        for (int64_t row = 0; row < count; ++row) bound_error(targets.bounds[row], rows[row]);
        for (int64_t from = packed_from_; from < last; from += kStrip) {
            const int64_t to = smaller(last, from + kStrip);
            score_strip(targets.panel, first, count, from, to);
            for (int64_t row = 0; row < count; ++row) {
                select(rows[row], end(first + row), scratch_.strip + row * kStripStride, from, to);
            }
        }
    }

    struct Targets {
        const Packed* panel;
        const Bound* bounds;
    };

    // The targets as a panel: where they are the behaviours of a panel of candidates, as usual, it serves as both.
    Targets target_panel(int64_t first, int64_t count) {
        const int64_t position = end(first);
        int64_t items[kPanelRows];
        for (int64_t row = 0; row < count; ++row) items[row] = target(first + row);
        bool packed = position % kPanelRows == 0 && position >= packed_from_ && position + count <= packed_to_;
        for (int64_t row = 0; packed && row < count; ++row) packed = items[row] == history_[position + row];
        if (packed) return {candidate_panel(position), scratch_.candidate_bounds + (position - packed_from_)};
        pack(items, count, scratch_.targets, scratch_.target_bounds);
        return {scratch_.targets, scratch_.target_bounds};
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

    void finish_row(int64_t place, Row& row) {
        const int64_t count = end(place), output = query(place) * task_.k;
        float* const scores = task_.scores + output;
        int64_t* const positions = task_.positions + output;
        widen(embedding(target(place)), task_.dim, scratch_.target);
        if (task_.k > kLargestK || !row.certified) return search_all(count, scores, positions);
        if (count <= task_.k) {
            for (int64_t position = 0; position < count; ++position) row.kept.positions[position] = position;
            row.kept.size = count;
        } else {
            tighten(row);
        }
        rescore(row.kept);
        write_best(row.kept, scores, positions);
    }

    // Exact scores in place of the approximate ones.
    void rescore(const Kept& kept) const {
        for (int64_t from = 0; from < kept.size; from += kExactRows) {
            const T* rows[kExactRows];
            for (int64_t row = 0; row < kExactRows; ++row) {
                rows[row] = embedding(history_[kept.positions[smaller(from + row, kept.size - 1)]]);
            }
            exact_scores(scratch_.target, rows, task_.dim, kept.scores + from);
        }
    }

    void write_best(const Kept& kept, float* scores, int64_t* positions) const {
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

    // The exact score of each of the first `count` behaviours.
    void search_all(int64_t count, float* scores, int64_t* positions) const {
        Best best(task_.k, scores, positions);
        for (int64_t last = count; last > 0; last -= kExactRows) {
            const T* rows[kExactRows];
            float exact[kExactRows];
            for (int64_t row = 0; row < kExactRows; ++row) {
                rows[row] = embedding(history_[last - 1 - smaller(row, last - 1)]);
            }
            exact_scores(scratch_.target, rows, task_.dim, exact);
            for (int64_t row = 0; row < smaller(kExactRows, last); ++row) best.offer(exact[row], last - 1 - row);
        }
        best.finish();
    }

    const HistoryTopk& task_;
    const Scratch& scratch_;
    const int64_t begin_, length_;
    const int64_t* const history_;
    int64_t longest_ = 0;
    int64_t packed_from_ = -1, packed_to_ = -1;
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
