// Dot products whose bits are the same on every level: the scores that rankings are decided and reported by.
// A score is the sum of rounded fp32 products over kLanes interleaved lanes, added up as a binary tree, so it depends
// on its two rows alone, whichever comes first. Compile without contraction into FMA. Included by the kernels inside
// their level's compilation only, in that level's namespace.
#pragma once

#include <cstdint>

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kVectors = kLanes / kWidth;

// A tile of targets and rows: as many as their sums fit in registers. What is loaded once serves the whole tile.
#if defined(__AVX512F__)
constexpr int kExactRows = 8, kExactTargets = 3;
#else
constexpr int kExactRows = 4, kExactTargets = 1;
#endif

// Elements of a row that are read in one go: rows come from the second-level cache a half faster in pieces of a KB than
// line by line in turn with others.
constexpr int64_t kBlock = 256;

constexpr int64_t padded(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// `out` has padded(dim) floats, zero past dim.
template <class T>
inline void widen(const T* row, int64_t dim, float* out) {
    T rest[kLanes] = {};
    for (int64_t d = 0; d < dim; d += kLanes) {
        const bool whole = d + kLanes <= dim;
        if (!whole) __builtin_memcpy(rest, row + d, (dim - d) * sizeof(T));
        for (int lane = 0; lane < kLanes; lane += kWidth) {
            store(out + d + lane, load((whole ? row + d : rest) + lane));
        }
    }
}

// Else it would be loaded again for each product of a tile, and loads take longer than the arithmetic.
inline void keep_in_register([[maybe_unused]] Floats& values) {
#if defined(__AVX512F__)
    asm("" : "+v"(values));
#endif
}

// Sums of kExactRows rows against some targets: lane l of a sum takes the elements l, l + kLanes, ...
template <int kTargets>
struct ExactSums {
    Floats at[kTargets][kExactRows][kVectors];

    // One by one: `= {}` clears memory, from which GCC loads them.
    ExactSums() {
        for (auto& rows : at) {
            for (auto& vectors : rows) {
                for (Floats& sum : vectors) sum = Floats{};
            }
        }
    }

    // The next kLanes elements of each, from `d` of the rows on.
    template <class T>
    void add(const float* targets, int64_t stride, const T* const* rows, int64_t d) {
        Floats held[kTargets][kVectors];
        for (int target = 0; target < kTargets; ++target) {
            for (int vector = 0; vector < kVectors; ++vector) {
                held[target][vector] = load(targets + target * stride + vector * kWidth);
                if (kTargets > 1) keep_in_register(held[target][vector]);
            }
        }
        for (int row = 0; row < kExactRows; ++row) {
            for (int vector = 0; vector < kVectors; ++vector) {
                Floats values = load(rows[row] + d + vector * kWidth);
                if (kTargets > 1) keep_in_register(values);
                for (int target = 0; target < kTargets; ++target) at[target][row][vector] += held[target][vector] * values;
            }
        }
    }

    // The next kBlock elements, row by row: with one target, loads take longer than products.
    template <class T>
    void add_block(const float* target, const T* const* rows, int64_t d) {
#pragma GCC unroll 8
        for (int row = 0; row < kExactRows; ++row) {
#pragma GCC unroll 16
            for (int64_t i = 0; i < kBlock; i += kLanes) add_lanes(at[0][row], target + i, rows[row] + d + i);
        }
    }

    [[gnu::always_inline]] inline void totals(float* out, int64_t stride) {
#pragma GCC unroll 4
        for (int target = 0; target < kTargets; ++target) {
#pragma GCC unroll 4
            for (int first = 0; first < kExactRows; first += 4) {
                Floats lanes[4];
                for (int row = 0; row < 4; ++row) lanes[row] = half_sums(at[target][first + row]);
                const Four four = sums(lanes);
                __builtin_memcpy(out + target * stride + first, &four, sizeof four);
            }
        }
    }

private:
    template <class T>
    static void add_lanes(Floats (&lanes)[kVectors], const float* target, const T* row) {
        for (int vector = 0; vector < kVectors; ++vector) {
            lanes[vector] += load(target + vector * kWidth) * load(row + vector * kWidth);
        }
    }

    // Adds lanes that are half of them apart until one vector holds the rest.
    static Floats half_sums(Floats (&lanes)[kVectors]) {
        for (int half = kVectors / 2; half > 0; half /= 2) {
            for (int vector = 0; vector < half; ++vector) lanes[vector] += lanes[vector + half];
        }
        return lanes[0];
    }
};

// scores[t * stride + r] = the score of widened target t, which lies padded(dim) after the one before it, with row r.
// kWhole: `dim` is a multiple of kLanes. Code that copies the rest of a row makes GCC keep all sums in memory.
template <int kTargets, bool kWhole, class T>
void exact_tile(const float* targets, const T* const* rows, int64_t dim, float* scores, int64_t stride) {
    ExactSums<kTargets> sums;
    int64_t d = 0;
    if constexpr (kTargets == 1) {
        for (; d + kBlock <= dim; d += kBlock) sums.add_block(targets + d, rows, d);
    }
    for (; d + kLanes <= dim; d += kLanes) sums.add(targets + d, padded(dim), rows, d);
    if constexpr (!kWhole) {
        T rest[kExactRows][kLanes] = {};
        const T* rests[kExactRows];
        for (int row = 0; row < kExactRows; ++row) {
            __builtin_memcpy(rest[row], rows[row] + d, (dim - d) * sizeof(T));
            rests[row] = rest[row];
        }
        sums.add(targets + d, padded(dim), rests, 0);
    }
    sums.totals(scores, stride);
}

template <int kTargets, class T>
inline void exact_scores(const float* targets, const T* const* rows, int64_t dim, float* scores, int64_t stride) {
    const auto tile = dim % kLanes == 0 ? exact_tile<kTargets, true, T> : exact_tile<kTargets, false, T>;
    tile(targets, rows, dim, scores, stride);
}

// The same of one target.
template <class T>
inline void exact_scores(const float* target, const T* const* rows, int64_t dim, float* scores) {
    exact_scores<1>(target, rows, dim, scores, kExactRows);
}

}  // namespace
}  // namespace rellax::RELLAX_LEVEL
