// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
//
// Scores of a panel of queries with a strip of candidates come from one of four sources:
//   product  many queries of a user: tiles of one product of their targets with the behaviours, from packed panels
//   sketch   few queries of a user: one row of the table, in 8 bits a component, after the other
//   direct   what is not worth packing: fp32 rows
//   row      targets that many candidates are compared with: the target's scores with all items, made beforehand
// The first two are approximate: of each query, those candidates are kept that the error bound leaves a chance to be
// among the best k, and exact scores of these decide.
#include "history_topk.h"

#include "exact.h"
#include "heap.h"
#include "select.h"
#include "similarity.h"
#include "sketch.h"

namespace rellax::RELLAX_LEVEL {
namespace {

constexpr int64_t kStrip = 1024;     // candidates whose scores with a panel of targets are held at once
constexpr int64_t kMostKept = 2 * kLargestHistoryK;  // candidates of a query that are kept from strip to strip
constexpr int64_t kMostRanked = 128;  // what ranking each against each pays for
constexpr int64_t kFewMore = 4;       // candidates beyond k that cost less than to find a better bound
constexpr int64_t kSlack = 16;        // a vector may be written past the last element
constexpr int64_t kStripStride = kStrip + kSlack;
constexpr int64_t kKeptStride = kMostKept + kStrip + kSlack;
constexpr int64_t kGroupQueries = 8 * kPanelRows;  // queries that share the packing of a part of a long history
constexpr int64_t kCachedBytes = 1 << 19;          // rows that stay in a core's cache while a panel is rescored
constexpr int64_t kMostAsked = 4096;    // bytes of the next query's history; the processor asks for those that follow
constexpr int64_t kResultsAhead = 4;    // queries whose results' pages, far apart, are looked up side by side
constexpr int64_t kUsersAhead = 3;      // look-ups between a query and the one whose user is asked for
constexpr int64_t kSketchAhead = 16;    // rows of a sketch that are asked for ahead
constexpr int64_t kShortSketch = 128;   // candidates up to which exact scores of all cost less than a sketch's first
// What a product costs beside its scores, in exact scores less approximate ones: to rescore a query, for each of its k
// results, and to pack a behaviour.
constexpr int64_t kRescoringCost = 8, kPackingCost = 26;
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
    bool exact;      // the scores are exact ones, and final
    bool certified;  // else all candidates get their exact scores
};

struct Scratch {
    float* wide;         // rows of up to task.block behaviours in fp32, padded
    Packed* candidates;  // their panels
    Bound* candidate_bounds;
    float* wide_targets;  // one panel's
    Packed* targets;
    Bound* target_bounds;
    int16_t* sketch_query;  // sketch_width(task.dim)
    float* strip;        // kPanelRows x kStrip
    float* kept_scores;  // kGroupQueries x (kMostKept + kStrip)
    int32_t* kept_positions;
    float* exact;        // those of a sketch's kept candidates that are known
    int32_t* chosen;     // which are to be
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
        sketch_query = arena.take<int16_t>(sketch_width(task.dim));
        strip = arena.take<float>(kPanelRows * kStripStride);
        kept_scores = arena.take<float>(kGroupQueries * kKeptStride);
        kept_positions = arena.take<int32_t>(kGroupQueries * kKeptStride);
        exact = arena.take<float>(kMostKept + kSlack);
        chosen = arena.take<int32_t>(kMostKept + kSlack);
        rows = arena.take<Row>(kGroupQueries);
        ranks = arena.take<int32_t>(kMostRanked + kSlack);
        ranked_scores = arena.take<float>(kMostRanked);
        ranked_positions = arena.take<int32_t>(kMostRanked);
        bytes = arena.used();
    }
};

// The larger of either; NaN counts as infinite.
inline Bound worse(Bound a, Bound b) {
    const auto worse = [](float x, float y) { return y <= x ? x : y < __builtin_inff() ? y : __builtin_inff(); };
    return {worse(a.norm, b.norm), worse(a.residual, b.residual)};
}

// Calls use() with the task's columns.
template <class Use>
[[gnu::always_inline]] inline void with_columns(const HistoryTopk& task, const Use& use) {
    if (column_bytes(task.count) == 2) return use(static_cast<const uint16_t*>(task.columns));
    use(static_cast<const uint32_t*>(task.columns));
}

// The queries of one user, by rising ends.
template <class T>
class UserSearch {
public:
    // `finite`: whether all of the task's row is; false where it has none. `sample`: of its scores.
    UserSearch(const HistoryTopk& task, const Scratch& scratch, int64_t user, bool finite, ScoreSample& sample)
        : task_(task),
          scratch_(scratch),
          finite_(finite),
          sample_(sample),
          begin_(task.offsets[user]),
          length_(task.offsets[user + 1] - begin_),
          history_(task.items + begin_) {}

    // Places [first, last) of the task's order; those before `later` are next.
    void run(int64_t first, int64_t last, int64_t later) {
        later_ = later;
        longest_ = end(last - 1);
        few_ = last - first < kFewHistoryQueries;
        const bool packed = packing_pays(first, last);
        while (first < last && task_.k <= kLargestHistoryK) {
            const int64_t count = smaller(kPanelRows, last - first);
            if (packed && end(first + count - 1) > kRescoringCost * task_.k) break;
            search_strips(first, count);
            first += count;
        }
        for (; first < last; first += kGroupQueries) search(first, smaller(kGroupQueries, last - first));
    }

private:
    int64_t query(int64_t place) const { return query_at(task_, place); }

    int64_t end(int64_t place) const { return task_.end == nullptr ? query(place) - begin_ : task_.end[query(place)]; }

    int64_t target(int64_t place) const { return target_of(task_, query(place)); }

    const T* embedding(int64_t item) const { return static_cast<const T*>(task_.embeddings) + item * task_.dim; }

    bool packing_pays(int64_t first, int64_t last) const {
        if (task_.row != nullptr) return false;
        int64_t saved = -kPackingCost * longest_;
        for (int64_t place = first; place < last; ++place) {
            const int64_t more = end(place) - kRescoringCost * task_.k;
            if (more > 0) saved += more;
        }
        return saved > 0;
    }

    void search(int64_t first, int64_t count) {
        const int64_t longest = end(first + count - 1);
        for (int64_t row = 0; row < count; ++row) start_row(row);
        if (task_.k <= kLargestHistoryK) {
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

    // A panel of queries from any source but the product.
    void search_strips(int64_t first, int64_t count) {
        const int64_t longest = end(first + count - 1), stride = padded(task_.dim);
        for (int64_t row = 0; row < count; ++row) {
            start_row(row);
            if (task_.row != nullptr) continue;
            widen(embedding(target(first + row)), task_.dim, scratch_.wide_targets + row * stride);
        }
        if (task_.row == nullptr) prefetch_targets(first + count, smaller(kPanelRows, later_ - first - count));
        for (int64_t from = 0; from < longest; from += kStrip) fill_strip(first, count, from, smaller(longest, from + kStrip));
        for (int64_t row = 0; row < count; ++row) {
            Row& of = scratch_.rows[row];
            if (settle(first + row, of)) {
                if (!of.exact) refine(of, scratch_.wide_targets + row * stride);
                write_best(first + row, of);
            } else {
                search_all(first + row);
            }
        }
    }

    void fill_strip(int64_t first, int64_t count, int64_t from, int64_t to) {
        const bool sketched = few_ && task_.sketch != nullptr && end(first + count - 1) > kShortSketch;
        if (task_.row == nullptr && !sketched) direct_strip(first, count, from, to);
        for (int64_t row = 0; row < count; ++row) {
            Row& of = scratch_.rows[row];
            float* const scores = scratch_.strip + row * kStripStride;
            const int64_t last = smaller(to, end(first + row));
            if (last <= from) continue;
            if (task_.row != nullptr) look_up(from, last, scores);
            if (sketched) sketch_strip(scratch_.wide_targets + row * padded(task_.dim), of, scores, from, last);
            of.exact = !sketched;
            of.certified &= sketched || finite_ || all_finite(scores, last - from);
            select(of, end(first + row), scores, from, to);
        }
    }

    void look_up(int64_t from, int64_t to, float* scores) const {
        const float* const row = task_.row;
        with_columns(task_, [&](auto columns) {
            const auto* const at = columns + begin_ + from;
#pragma GCC unroll 8
            for (int64_t i = 0; i < to - from; ++i) scores[i] = row[at[i]];
        });
    }

    // Some rows of candidates after the other, while they are in the cache against all targets.
    void direct_strip(int64_t first, int64_t count, int64_t from, int64_t to) {
        for (int64_t at = from; at < to; at += kExactRows) {
            const T* rows[kExactRows];
            for (int64_t i = 0; i < kExactRows; ++i) rows[i] = embedding(history_[smaller(at + i, to - 1)]);
            prefetch(history_ + at + kExactRows, smaller(kExactRows, to - at - kExactRows));
            int64_t row = 0;
            while (end(first + row) <= at) ++row;
            const float* target = scratch_.wide_targets + row * padded(task_.dim);
            float* scores = scratch_.strip + row * kStripStride + (at - from);
            for (; row < count; row += kExactTargets) {
                if (row + kExactTargets <= count) {
                    exact_scores<kExactTargets>(target, rows, task_.dim, scores, kStripStride);
                } else {
                    for (int64_t rest = 0; rest < count - row; ++rest) {
                        exact_scores(target + rest * padded(task_.dim), rows, task_.dim, scores + rest * kStripStride);
                    }
                }
                target += kExactTargets * padded(task_.dim);
                scores += kExactTargets * kStripStride;
            }
        }
    }

    void sketch_strip(const float* target, Row& row, float* scores, int64_t from, int64_t to) {
        const SketchQuery query = sketch_query(target, task_.dim, task_.sketch_residual, scratch_.sketch_query);
        worst_ = {task_.sketch_norm, task_.sketch_residual};
        bound_error(query.bound, row);
        for (int64_t at = from; at < to; at += kSketchRows) {
            const int8_t *rows[kSketchRows], *later[kSketchRows];
            for (int64_t i = 0; i < kSketchRows; ++i) {
                rows[i] = sketch_row(history_[smaller(at + i, to - 1)]);
                later[i] = sketch_row(history_[smaller(at + i + kSketchAhead, to - 1)]);
            }
            sketch_scores(query, rows, later, task_.dim, scores + (at - from));
        }
    }

    const int8_t* sketch_row(int64_t item) const { return task_.sketch + item * sketch_bytes(task_.dim); }

    // Exact scores in place of a sketch's: first of k good candidates, whose k-th best leaves fewer of the others.
    void refine(Row& row, const float* target) const {
        constexpr int kSteps = 10;  // more than elsewhere: a row costs more than a step
        Kept& kept = row.kept;
        float* const exact = scratch_.exact;
        for (int64_t i = 0; i < kept.size; ++i) exact[i] = -__builtin_inff();
        pad_scores(exact, kept.size);
        score_between(row.lower, __builtin_inff(), kept, target, exact);
        const float kth = bisect_kth(exact, kept.size, task_.k, -__builtin_inff(), kSteps);
        score_between(kth - row.error, row.lower, kept, target, exact);
        for (int64_t i = 0; i < kept.size; ++i) kept.scores[i] = exact[i];
        kept.tighten(-__builtin_inff());
    }

    // Exact scores of those candidates whose approximate ones are at least `low`, and less than `high`.
    void score_between(float low, float high, const Kept& kept, const float* target, float* exact) const {
        int32_t* const chosen = scratch_.chosen;
        int64_t count = 0;
        for (int64_t i = 0; i < kept.size; ++i) {
            chosen[count] = static_cast<int32_t>(i);
            count += low <= kept.scores[i] && kept.scores[i] < high;
        }
        for (int64_t i = 0; i < count; ++i) prefetch(history_ + kept.positions[chosen[i]], 1);
        const auto row_at = [&](int64_t i) { return embedding(history_[kept.positions[chosen[i]]]); };
        score_each(target, count, row_at, [&](int64_t i, float score) { exact[chosen[i]] = score; });
    }

    void start_row(int64_t row) {
        const int64_t at = row * kKeptStride;
        const Kept kept{scratch_.kept_scores + at, scratch_.kept_positions + at, 0};
        scratch_.rows[row] = {kept, 0, -__builtin_inff(), 0.0f, false, true};
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

    [[gnu::always_inline]] inline void prefetch_targets(int64_t first, int64_t count) const {
        for (int64_t place = first; place < first + count; ++place) {
            prefetch_bytes(embedding(target(place)), task_.dim * static_cast<int64_t>(sizeof(T)));
        }
    }

    // Asks for rows that are read soon: each lies somewhere else in memory.
    [[gnu::always_inline]] inline void prefetch(const int64_t* items, int64_t count) const {
        for (int64_t row = 0; row < count; ++row) {
            prefetch_bytes(embedding(items[row]), task_.dim * static_cast<int64_t>(sizeof(T)));
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
        if (count <= 0 || !row.certified || (end <= task_.k && !row.exact)) return;
        pad_scores(scores, count);
        if (from == 0 && task_.row != nullptr && guess(row, scores, count)) return;
        if (from == 0 && end > task_.k) row.lower = kth_lower_bound(scores, count, task_.k);
        row.kept.append(scores, count, from, row.lower - 2.0f * row.error);
        if (row.kept.size > kMostKept) tighten(row);
    }

    // Keeps those from a score on that, going by the sample, some more than k reach; false where fewer than k do.
    bool guess(Row& row, const float* scores, int64_t count) {
        const int64_t most = whole_vectors(task_.k + kFewMore);
        if (count > most) {
            if (!sample_.complete()) {
                sample_.add(scores, count);
                return false;
            }
            row.lower = sample_.reached_by((task_.k + most) / 2, count);
        }
        row.kept.append(scores, count, 0, row.lower);
        const bool found = count <= most || row.kept.size >= task_.k;
        if (!found) row.kept.size = 0;
        return found;
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
        if (task_.k > kLargestHistoryK || !row.certified) return false;
        if (count > task_.k) {
            const int64_t enough = task_.k + kFewMore;
            if (row.kept.size > (row.exact ? whole_vectors(enough) : enough)) tighten(row);
        } else if (!row.exact) {
            for (int64_t position = 0; position < count; ++position) {
                row.kept.scores[position] = 0.0f;
                row.kept.positions[position] = position;
            }
            row.kept.size = count;
        }
        return row.certified;
    }

    // A panel of queries whose candidates are loaded: part by part, so that all of them find its rows in the cache.
    void finish_cached(int64_t first, int64_t count) {
        if (task_.k <= kLargestHistoryK && end(first + count - 1) > 0) rescore_group(first, count);
        for (int64_t row = 0; row < count; ++row) {
            Row& of = scratch_.rows[row];
            if (of.certified && task_.k <= kLargestHistoryK) {
                write_best(first + row, of);
            } else {
                search_all(first + row);
            }
        }
    }

    const float* wide_target(int64_t place) const {
        const int64_t position = end(place);
        if (position < loaded_to_ && history_[position] == target(place)) return wide(position);
        widen(embedding(target(place)), task_.dim, scratch_.wide_targets);
        return scratch_.wide_targets;
    }

    void rescore_group(int64_t first, int64_t count) {
        const int64_t longest = end(first + count - 1), stride = padded(task_.dim);
        for (int64_t row = 0; row < count; ++row) scratch_.rows[row].certified = settle(first + row, scratch_.rows[row]);
        const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(float));
        const int64_t part = 0 < row_bytes && row_bytes < kCachedBytes ? kCachedBytes / row_bytes : 1;
        for (int64_t from = 0; from < longest; from += part) {
            for (int64_t row = 0; row < count; ++row) {
                Row& of = scratch_.rows[row];
                if (of.certified) rescore(of, from + part, wide_target(first + row), [&](int64_t at) { return wide(at); });
            }
        }
    }

    // Exact scores in place of the approximate ones, of the candidates before `to`.
    template <class RowAt>
    void rescore(Row& row, int64_t to, const float* target, RowAt row_at) const {
        const int32_t* const positions = row.kept.positions;
        const int64_t from = row.rescored;
        int64_t last = from;
        while (last < row.kept.size && positions[last] < to) ++last;
        row.rescored = last;
        float* const scores = row.kept.scores + from;
        const auto row_of = [&](int64_t i) { return row_at(positions[from + i]); };
        score_each(target, last - from, row_of, [&](int64_t i, float score) { scores[i] = score; });
    }

    // Calls use(i, exact score) for row_at(i), i < count; some rows share a pass over the target's.
    template <class RowAt, class Use>
    void score_each(const float* target, int64_t count, const RowAt& row_at, const Use& use) const {
        for (int64_t from = 0; from < count; from += kExactRows) {
            decltype(row_at(0)) rows[kExactRows];
            float scores[kExactRows];
            for (int64_t i = 0; i < kExactRows; ++i) rows[i] = row_at(smaller(from + i, count - 1));
            exact_scores(target, rows, task_.dim, scores);
            for (int64_t i = 0; i < smaller(kExactRows, count - from); ++i) use(from + i, scores[i]);
        }
    }

    struct RowOf {
        const UserSearch& search;
        const T* operator()(int64_t at) const { return search.embedding(search.history_[at]); }
    };

    // A query whose candidates were loaded one block after the other.
    void finish_far(int64_t place, Row& row) {
        if (!settle(place, row)) return search_all(place);
        widen(embedding(target(place)), task_.dim, scratch_.wide_targets);
        rescore(row, end(place), scratch_.wide_targets, RowOf{*this});
        write_best(place, row);
    }

    void write_best(int64_t place, const Row& row) const {
        const Kept& kept = row.kept;
        const int64_t output = query(place) * task_.k;
        float* const scores = task_.scores + output;
        int64_t* const positions = task_.positions + output;
        if (kept.size > kMostRanked || !(row.exact || all_finite(kept.scores, kept.size))) {
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
        const auto row_at = [&](int64_t i) { return embedding(history_[count - 1 - i]); };
        score_each(target_row, count, row_at, [&](int64_t i, float score) { best.offer(score, count - 1 - i); });
        best.finish();
    }

    const HistoryTopk& task_;
    const Scratch& scratch_;
    const bool finite_;
    ScoreSample& sample_;
    const int64_t begin_, length_;
    const int64_t* const history_;
    int64_t longest_ = 0, later_ = 0;
    bool few_ = false;
    int64_t loaded_from_ = -1, loaded_to_ = -1;
    Bound worst_{};  // of the packed candidates
};

// Whose a query is: `from` or a later user, who is often not far.
int64_t user_of(const HistoryTopk& task, int64_t query, int64_t from) {
    if (task.user != nullptr) return task.user[query];
    if (task.user_at != nullptr) from = task.user_at[query / kUserStep];
    int64_t low = from, step = 1;
    for (; low + step < task.users && task.offsets[low + step] <= query; step *= 2) low += step;
    int64_t high = smaller(low + step, task.users);
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (task.offsets[middle] <= query ? low : high) = middle;
    }
    return low;
}

// Asks for what the look-ups of a frequent target's query read.
[[gnu::always_inline]] inline void ask_for_columns(const HistoryTopk& task, int64_t query, int64_t user) {
    const int64_t begin = task.offsets[user], end = task.end == nullptr ? query - begin : task.end[query];
    with_columns(task, [&](auto columns) {
        prefetch_bytes(columns + begin, smaller(end * static_cast<int64_t>(sizeof *columns), kMostAsked));
    });
}

// And for what they write.
[[gnu::always_inline]] inline void ask_for_results(const HistoryTopk& task, int64_t query) {
    prefetch_bytes<1>(task.positions + query * task.k, task.k * static_cast<int64_t>(sizeof(int64_t)));
    prefetch_bytes<1>(task.scores + query * task.k, task.k * static_cast<int64_t>(sizeof(float)));
}

template <class T>
void run(const HistoryTopk& task, int64_t first, int64_t last, const Scratch& scratch) {
    const auto query = [&](int64_t place) { return query_at(task, place); };
    const bool finite = task.row != nullptr && all_finite(task.row, task.count);
    ScoreSample sample;
    for (int64_t user = user_of(task, query(first), 0); first < last;) {
        const auto same_user = [&](int64_t query) {
            return task.user == nullptr ? query < task.offsets[user + 1] : task.user[query] == user;
        };
        int64_t next = first + 1;
        if (task.user == nullptr && task.order == nullptr) next = smaller(task.offsets[user + 1], last);
        while (next < last && same_user(query(next))) ++next;
        const int64_t next_user = next < last ? user_of(task, query(next), user) : 0;
        if (task.row != nullptr && next < last) ask_for_columns(task, query(next), next_user);
        if (task.row != nullptr && first % kResultsAhead == 0) {
            const int64_t stop = smaller(next + kResultsAhead, last);
            for (int64_t place = next; place < stop; ++place) ask_for_results(task, query(place));
        }
        if (task.user_at != nullptr) {
            const auto user_at = [&](int64_t later) {
                return task.user_at + query(smaller(next + later, last - 1)) / kUserStep;
            };
            __builtin_prefetch(user_at(2 * kUsersAhead));
            __builtin_prefetch(task.offsets + *user_at(kUsersAhead));
        }
        UserSearch<T>(task, scratch, user, finite, sample).run(first, next, last);
        first = next;
        user = next_user;
    }
}

// Some rows of items after the other, while they are in the cache against all targets.
template <class T>
void make_rows(const HistoryTopk& task, const int64_t* targets, int64_t count, int64_t first, int64_t last,
               float* rows, float* wide) {
    const T* const table = static_cast<const T*>(task.embeddings);
    const int64_t stride = padded(task.dim);
    for (int64_t target = 0; target < count; ++target) {
        widen(table + targets[target] * task.dim, task.dim, wide + target * stride);
    }
    for (int64_t item = first; item < last; item += kExactRows) {
        const T* items[kExactRows];
        for (int64_t i = 0; i < kExactRows; ++i) items[i] = table + smaller(item + i, last - 1) * task.dim;
        const int64_t found = smaller(kExactRows, last - item);
        for (int64_t target = 0; target < count;) {
            float scores[kExactTargets * kExactRows];
            const int64_t together = target + kExactTargets <= count ? kExactTargets : 1;
            if (together == 1) {
                exact_scores(wide + target * stride, items, task.dim, scores);
            } else {
                exact_scores<kExactTargets>(wide + target * stride, items, task.dim, scores, kExactRows);
            }
            for (int64_t i = 0; i < together; ++i, ++target) {
                __builtin_memcpy(rows + target * task.count + item, scores + i * kExactRows, found * sizeof(float));
            }
        }
    }
}

}  // namespace

int64_t history_topk_scratch(const HistoryTopk& task) { return Scratch(task, nullptr).bytes; }

void history_topk(const HistoryTopk& task, int64_t first, int64_t last, void* memory) {
    const Scratch scratch(task, memory);
    with_type(task.dtype, [&](auto type) { run<decltype(type)>(task, first, last, scratch); });
}

void history_topk_rows(const HistoryTopk& task, const int64_t* targets, int64_t count, int64_t first, int64_t last,
                       float* rows, void* memory) {
    float* const wide = static_cast<float*>(memory);
    with_type(task.dtype, [&](auto type) { make_rows<decltype(type)>(task, targets, count, first, last, rows, wide); });
}

HistorySketchBound history_topk_sketch(const HistoryTopk& task, int64_t first, int64_t last, int8_t* sketch) {
    Bound worst{0.0f, 0.0f};
    with_type(task.dtype, [&](auto type) {
        const auto* const table = static_cast<const decltype(type)*>(task.embeddings);
        for (int64_t item = first; item < last; ++item) {
            int8_t* const row = sketch + item * sketch_bytes(task.dim);
            worst = worse(worst, make_sketch(table + item * task.dim, task.dim, row));
        }
    });
    return {worst.norm, worst.residual};
}

}  // namespace rellax::RELLAX_LEVEL
