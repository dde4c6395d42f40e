// The k nearest earlier behaviours of a user to a target item, for many queries at once.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rellax {

// Plain pointers and sizes: what an ISA-compiled kernel may see. All indices have been checked by the caller.
struct HistoryTopk {
    const void* embeddings;  // (N, dim), rows back to back
    Dtype dtype;
    int64_t count;  // N
    int64_t dim;
    const int64_t* items;    // (M,) row of `embeddings` of each behaviour, user by user, in time order
    const int64_t* offsets;  // (U + 1,) where a user's behaviours begin
    int64_t users;           // U
    const int64_t* target;   // (Q,) row of `embeddings`; this and the next two null: every behaviour is a target
    const int64_t* user;     // (Q,)
    const int64_t* end;      // (Q,) the user's first `end` behaviours are the candidates
    int64_t queries;
    int64_t k;
    int64_t* positions;  // (Q, k) within the user's behaviours, best first; -1 past the last candidate
    float* scores;       // (Q, k); -inf past the last candidate; the first is NaN where any was not finite

    // What history_topk fills in for its kernels.
    const uint32_t* order = nullptr;  // the query at each place, by user and end; null: all of them, which come so
    int64_t block = 0;                // behaviours of a user that are packed at once, a multiple of kHistoryBlock
    const float* row = nullptr;       // (N,) exact scores of the queries' one target with all items, or null;
                                      // a vector past the last is readable
    const void* columns = nullptr;    // beside it: (M,) `items` in column_bytes(N) each, unsigned,
    const int64_t* user_at = nullptr; // and without `user` that of each kUserStep-th behaviour; or null
    const int8_t* sketch = nullptr;   // (N, sketch_bytes(dim)), rows of sketch.h, or null
    float sketch_norm = 0.0f, sketch_residual = 0.0f;  // bounds of its rows
};

static constexpr int64_t query_at(const HistoryTopk& task, int64_t place) {
    return task.order == nullptr ? place : task.order[place];
}

static constexpr int64_t target_of(const HistoryTopk& task, int64_t query) {
    return (task.target == nullptr ? task.items : task.target)[query];
}

// At least the norm of each of some rows and of what rounding took from it.
struct HistorySketchBound {
    float norm, residual;
};

constexpr int64_t kHistoryBlock = 1024;
constexpr int64_t kFewHistoryQueries = 4;  // of a user: below it rows of a sketch may pay
constexpr int64_t kUserStep = 256;
constexpr int64_t kLargestHistoryK = 512;  // above it a heap goes over the exact scores of all candidates
constexpr int64_t kMostHistoryQueries = (int64_t{1} << 32) - 1;

// Places [first, last) of the order. `scratch` holds as many bytes as the other kernel says, aligned to 64.
using HistoryTopkKernel = void(const HistoryTopk& task, int64_t first, int64_t last, void* scratch);
using HistoryTopkScratch = int64_t(const HistoryTopk& task);

// Exact scores of some targets with the items [first, last): target t's are rows[t * N + item]. `scratch` holds
// history_row_bytes() for each target, aligned to 64.
using HistoryRowsKernel = void(const HistoryTopk& task, const int64_t* targets, int64_t count, int64_t first,
                               int64_t last, float* rows, void* scratch);

static constexpr int64_t history_row_bytes(int64_t dim) { return (dim + 15) / 16 * 16 * 4; }

static constexpr int64_t column_bytes(int64_t count) { return count <= int64_t{1} << 16 ? 2 : 4; }

constexpr int64_t kSketchBlock = 64;  // components of a row of a sketch that share a scale

static constexpr int64_t sketch_blocks(int64_t dim) { return (dim + kSketchBlock - 1) / kSketchBlock; }

static constexpr int64_t sketch_width(int64_t dim) { return sketch_blocks(dim) * kSketchBlock; }

// Of a row: its components and then a float for each block and one more, in whole lines of the cache.
static constexpr int64_t sketch_bytes(int64_t dim) { return sketch_width(dim) + (sketch_blocks(dim) * 4 + 67) / 64 * 64; }

// Rows [first, last) of `sketch`.
using HistorySketchKernel = HistorySketchBound(const HistoryTopk& task, int64_t first, int64_t last, int8_t* sketch);

// All queries, kMostHistoryQueries at most, on at most `threads` threads; the result does not depend on their number.
void history_topk(HistoryTopk task, int threads);

}  // namespace rellax
