// The k nearest earlier behaviours of a user to a target item, for many queries at once.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rellax {

// Plain pointers and sizes: what an ISA-compiled kernel may see. All indices have been checked by the caller.
struct HistoryTopk {
    const void* embeddings;  // (N, dim), rows back to back
    Dtype dtype;
    int64_t dim;
    const int64_t* items;    // (M,) row of `embeddings` of each behaviour, user by user, in time order
    const int64_t* offsets;  // (U + 1,) where a user's behaviours begin
    const int64_t* target;   // (Q,) row of `embeddings`
    const int64_t* user;     // (Q,)
    const int64_t* end;      // (Q,) the user's first `end` behaviours are the candidates
    int64_t queries;
    int64_t k;
    int64_t* positions;  // (Q, k) within the user's behaviours, best first; -1 past the last candidate
    float* scores;       // (Q, k); -inf past the last candidate; the first is NaN where any was not finite
};

// A score is the sum of rounded fp32 products over this many interleaved lanes, added up as a binary tree.
// Every level keeps this order, so scores and positions have the same bits on all of them.
constexpr int64_t kLanes = 16;
constexpr int64_t kMaxBlock = 8;  // queries a kernel may take at once

constexpr int64_t padded(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// Queries [first, last). `scratch` holds kMaxBlock * padded(dim) floats.
using HistoryTopkKernel = void(const HistoryTopk& task, int64_t first, int64_t last, float* scratch);

// All queries, on at most `threads` threads; the result does not depend on their number.
void history_topk(const HistoryTopk& task, int threads);

}  // namespace rellax
