// The embedding of every token, from one of two tables, and the sums that are the gradient of such a lookup.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rellax {

// Rows of one dtype, each with its elements side by side.
struct Rows {
    const void* data;
    Dtype dtype;
    int64_t count;
    int64_t stride;  // elements from row to row
};

// out (tokens, d) in the words' dtype: row soft_index of `soft` where that is not negative, else word_scale times row
// input_ids of `words`.
struct SoftPrompt {
    Rows words, soft;
    float word_scale;
    const int64_t* input_ids;   // (tokens,)
    const int64_t* soft_index;  // (tokens,)
    int64_t tokens, d;
    void* out;
};

// out (count, d): row i is `factor` times the sum, in fp32 and in order, of all rows whose index is i. An index outside
// of [0, count) is in no sum.
struct RowSums {
    Rows rows;
    const int64_t* index;  // one for each of `rows`
    float factor;
    int64_t d, count;
    Dtype dtype;  // of `out`
    void* out;
};

constexpr int64_t kSumColumns = 1024;                // of one call of the kernel, at most
constexpr int64_t kBytesAhead = int64_t{16} << 10;  // of rows are on their way from memory while one is worked on

// target (d,) = factor · source (d,).
using ConvertKernel = void(Dtype from, const void* source, float factor, Dtype to, void* target, int64_t d);

// Rows [first_row, last_row) and columns [first_column, last_column) of the sums; those that belong to sum i are
// rows[token[start[i]]] ... rows[token[start[i + 1] - 1]].
using RowSumsKernel = void(const RowSums& task, const int64_t* start, const int64_t* token, int64_t first_row,
                           int64_t last_row, int64_t first_column, int64_t last_column);

// No result depends on `threads`. soft_prompt throws std::invalid_argument where a table has no such row.
void soft_prompt(const SoftPrompt& task, int threads);
void row_sums(const RowSums& task, int threads);

}  // namespace rellax
