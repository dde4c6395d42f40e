// Selection from a row of scores without sorting it: a lower bound of the k-th best, the scores from a threshold on,
// and the final order of the few that are left. Included by the kernels inside their level's compilation only, in that
// level's namespace. Scores are finite, or -inf as padding.
#pragma once

#include <cstdint>

#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rellax::RELLAX_LEVEL {
namespace {

inline int64_t whole_vectors(int64_t count) { return (count + kWidth - 1) / kWidth * kWidth; }

// Fills the last vector of `count` scores with -inf.
inline void pad_scores(float* scores, int64_t count) {
    for (int64_t i = count; i < whole_vectors(count); ++i) scores[i] = -__builtin_inff();
}

inline Integers load_places(const int32_t* source) {
    Integers places;
    __builtin_memcpy(&places, source, sizeof places);
    return places;
}

inline Integers count_up() {
    Integers places;
    for (int lane = 0; lane < kWidth; ++lane) places[lane] = lane;
    return places;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// How many of the scores are at least x.
inline int64_t count_at_least(const float* scores, int64_t count, float x) {
    const Floats bound = Floats{} + x;
#if defined(__AVX512F__)
    int64_t total = 0;
    for (int64_t i = 0; i < count; i += kWidth) {
        total += __builtin_popcount(_mm512_cmp_ps_mask((__m512)load(scores + i), (__m512)bound, _CMP_GE_OQ));
    }
    return total;
#else
    Integers totals = {};
    for (int64_t i = 0; i < count; i += kWidth) totals -= load(scores + i) >= bound;
    int64_t total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += totals[lane];
    return total;
#endif
}

inline bool all_finite(const float* scores, int64_t count) {
    Integers odd = {};
    for (int64_t i = 0; i < count; i += kWidth) {
        const Floats values = load(scores + i);
        odd |= (values - values != 0.0f) & (count_up() + static_cast<int32_t>(i) < static_cast<int32_t>(count));
    }
    int32_t any = 0;
    for (int lane = 0; lane < kWidth; ++lane) any |= odd[lane];
    return any == 0;
}

inline float largest_in(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    float lanes[kWidth];
    store(lanes, values);
    for (int half = kWidth / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            lanes[lane] = lanes[lane + half] > lanes[lane] ? lanes[lane + half] : lanes[lane];
        }
    }
    return lanes[0];
#endif
}

struct Range {
    float low, high;
};

// The smallest and the largest of the padded scores, the padding apart.
inline Range range_of(const float* scores, int64_t count) {
    Floats low = Floats{} + __builtin_inff(), high = -low;
    for (int64_t i = 0; i < count; i += kWidth) {
        const Floats values = load(scores + i);
        low = (values < low) & (values >= -__FLT_MAX__) ? values : low;
        high = larger(values, high);
    }
    return {-largest_in(-low), largest_in(high)};
}

// A value that at least k of the padded scores reach, close below the k-th best of them, given one such or -inf.
inline float bisect_kth(const float* scores, int64_t count, int64_t k, float known = -__builtin_inff(), int steps = 6) {
    Range range = range_of(scores, count);
    if (known > range.low) range.low = known;
    for (int step = 0; step < steps; ++step) {
        const float middle = range.low + 0.5f * (range.high - range.low);
        const bool reached = count_at_least(scores, count, middle) >= k;
        range = reached ? Range{middle, range.high} : Range{range.low, middle};
    }
    return range.low;
}

// The same from the maxima of strided classes of scores where there are many: k of the scores reach it as well.
inline float kth_lower_bound(const float* scores, int64_t count, int64_t k) {
    constexpr int64_t kClasses = 64;
    if (k > kClasses / 2 || count <= 2 * kClasses) return bisect_kth(scores, count, k);
    constexpr int kVectors = kClasses / kWidth;
    Floats best[kVectors];
    for (int i = 0; i < kVectors; ++i) best[i] = load(scores + i * kWidth);
    int64_t i = kClasses;
    for (; i + kClasses <= count; i += kClasses) {
        for (int j = 0; j < kVectors; ++j) best[j] = larger(load(scores + i + j * kWidth), best[j]);
    }
    float maxima[kClasses];
    for (int j = 0; j < kVectors; ++j) store(maxima + j * kWidth, best[j]);
    for (float* maximum = maxima; i < count; i += kWidth, maximum += kWidth) {
        store(maximum, larger(load(scores + i), load(maximum)));
    }
    return bisect_kth(maxima, kClasses, k);
}

// Candidates of one query: scores and positions, which rise. What is written may run one vector over `size`.
struct Kept {
    float* scores;
    int32_t* positions;
    int64_t size;

    // Appends those of one vector that are at least `bound`.
    void append(Floats values, Integers places, Floats bound) {
#if defined(__AVX512F__)
        const __mmask16 mask = _mm512_cmp_ps_mask((__m512)values, (__m512)bound, _CMP_GE_OQ);
        _mm512_storeu_ps(scores + size, _mm512_maskz_compress_ps(mask, (__m512)values));
        _mm512_storeu_si512(positions + size, _mm512_maskz_compress_epi32(mask, (__m512i)places));
        size += __builtin_popcount(mask);
#else
        for (int lane = 0; lane < kWidth; ++lane) {
            scores[size] = values[lane];
            positions[size] = places[lane];
            size += values[lane] >= bound[lane];
        }
#endif
    }

    // Appends those of `count` padded scores, of the positions from `first` on, that are at least `threshold`.
    void append(const float* row, int64_t count, int64_t first, float threshold) {
        const Floats bound = above_padding(threshold);
        Integers places = count_up() + static_cast<int32_t>(first);
        Kept kept = *this;  // in registers
        for (int64_t i = 0; i < count; i += kWidth, places += kWidth) kept.append(load(row + i), places, bound);
        size = kept.size;
    }

    // Drops those below `threshold`.
    void tighten(float threshold) {
        const int64_t count = size;
        pad_scores(scores, count);
        const Floats bound = above_padding(threshold);
        Kept kept{scores, positions, 0};  // in registers
        for (int64_t i = 0; i < count; i += kWidth) kept.append(load(scores + i), load_places(positions + i), bound);
        size = kept.size;
    }

private:
    // No padding is kept, whatever the threshold.
    static Floats above_padding(float threshold) {
        return Floats{} + (threshold > -__FLT_MAX__ ? threshold : -__FLT_MAX__);
    }
};

// Counts where a > b, or with kEqual a >= b.
template <bool kEqual>
inline Integers count_where(Integers counts, float a, Floats b) {
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_set1_ps(a), (__m512)b, kEqual ? _CMP_GE_OQ : _CMP_GT_OQ);
    return (Integers)_mm512_mask_add_epi32((__m512i)counts, mask, (__m512i)counts, _mm512_set1_epi32(1));
#else
    return counts - (kEqual ? a >= b : a > b);
#endif
}

// ranks[i] = how many of the `count` padded scores are better than the i-th: larger, or equal and of a later place.
inline void rank(const float* scores, int64_t count, int32_t* ranks) {
    Integers total = {};
    for (int64_t block = 0; block < count; block += kWidth) {
        const Floats own = load(scores + block);
        Integers better = {};
        int64_t i = 0;
#pragma GCC unroll 4
        for (; i < smaller(block + kWidth, count); ++i) better = count_where<false>(better, scores[i], own);
#pragma GCC unroll 4
        for (; i < count; ++i) better = count_where<true>(better, scores[i], own);
        __builtin_memcpy(ranks + block, &better, sizeof better);
        total += better;
    }
    // Equal ones within a vector are missing: else ranks are 0, 1, ... and those of the padding `count`.
    int64_t sum = 0;
    for (int lane = 0; lane < kWidth; ++lane) sum += total[lane];
    if (sum == count * (count - 1) / 2 + count * (whole_vectors(count) - count)) return;
    for (int64_t block = 0; block < count; block += kWidth) {
        const Floats own = load(scores + block);
        Integers better = load_places(ranks + block);
        for (int32_t lane = 1; lane < smaller(kWidth, count - block); ++lane) {
            better -= (scores[block + lane] == own) & (lane > count_up());
        }
        __builtin_memcpy(ranks + block, &better, sizeof better);
    }
}

// Some of the scores of the first rows of many that are alike: what a given part of the next row's will reach.
class ScoreSample {
public:
    bool complete() const { return size_ == kSize; }

    // Takes some of a row's scores, evenly spread, while it is not complete.
    void add(const float* scores, int64_t count) {
        const int64_t step = count / kOfRow;
        if (step == 0) return;
        for (int64_t i = 0; i < kOfRow; ++i) scores_[size_++] = scores[i * step];
        if (complete()) sort();
    }

    // About `part` of `whole` scores are larger.
    float reached_by(int64_t part, int64_t whole) const { return sorted_[kSize * part / whole]; }

private:
    static constexpr int64_t kSize = 256, kOfRow = 32;

    void sort() {
        int32_t ranks[kSize];
        rank(scores_, kSize, ranks);
        for (int64_t i = 0; i < kSize; ++i) sorted_[ranks[i]] = scores_[i];
    }

    int64_t size_ = 0;
    float scores_[kSize], sorted_[kSize];
};

}  // namespace
}  // namespace rellax::RELLAX_LEVEL
