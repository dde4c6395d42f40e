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

// Rows that share a pass over the target: as many as their sums fit in registers.
#if defined(__AVX512F__)
constexpr int kExactRows = 8;
#else
constexpr int kExactRows = 4;
#endif

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

// Sums of kExactRows rows against one target: lane l of a sum takes the elements l, l + kLanes, ...
struct ExactSums {
    Floats at[kExactRows][kVectors] = {};

    template <class T>
    void add(const float* target, const T* const* rows, int64_t d) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const Floats values = load(target + d + vector * kWidth);
            for (int row = 0; row < kExactRows; ++row) {
                at[row][vector] += values * load(rows[row] + d + vector * kWidth);
            }
        }
    }

    void totals(float* out) {
        for (int first = 0; first < kExactRows; first += 4) {
            Floats lanes[4];
            for (int row = 0; row < 4; ++row) lanes[row] = half_sums(at[first + row]);
            const Four four = sums(lanes);
            __builtin_memcpy(out + first, &four, sizeof four);
        }
    }

private:
    // Adds lanes that are half of them apart until one vector holds the rest.
    static Floats half_sums(Floats (&lanes)[kVectors]) {
        for (int half = kVectors / 2; half > 0; half /= 2) {
            for (int vector = 0; vector < half; ++vector) lanes[vector] += lanes[vector + half];
        }
        return lanes[0];
    }
};

// Scores of the widened target with kExactRows rows.
template <class T>
inline void exact_scores(const float* target, const T* const* rows, int64_t dim, float* scores) {
    ExactSums sums;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) sums.add(target, rows, d);
    if (d < dim) {
        T rest[kExactRows][kLanes] = {};
        const T* rests[kExactRows];
        for (int row = 0; row < kExactRows; ++row) {
            __builtin_memcpy(rest[row], rows[row] + d, (dim - d) * sizeof(T));
            rests[row] = rest[row];
        }
        sums.add(target + d, rests, 0);
    }
    sums.totals(scores);
}

}  // namespace
}  // namespace rellax::RELLAX_LEVEL
