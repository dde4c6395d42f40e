// The k items with the largest dot product with each query item, exactly.
#pragma once

#include <cstdint>
#include <memory>

#include "dtype.h"

namespace rellax {

// What is asked for: plain pointers and sizes. All indices have been checked by the caller, dot products are finite.
struct ItemTopk {
    const void* embeddings;  // (items, dim), rows back to back
    Dtype dtype;
    int64_t items;
    int64_t dim;
    const int64_t* query;  // (queries,) row of `embeddings`; null: every item is a query, in order
    int64_t queries;
    int64_t k;
    bool exclude_self;
    int64_t* indices;  // (queries, k) best first; -1 past the last item
    float* scores;     // (queries, k); -inf past the last item
};

// Rows in the kernels' layout, in whole panels, each with how far an approximate product with it may be off: for rows
// i and j by error[i] * norm[j] + norm[i] * error[j]. Rows that only fill up the last panel have an error of NaN.
struct PackedRows {
    void* panels;
    float* norm;
    float* error;
};

// An item whose score is known to lie in [lower, upper]; where both are the same, that is the score.
struct Candidate {
    float lower;
    float upper;
    uint32_t item;
};

constexpr int64_t kSampled = 128;  // a multiple of every level's panel_rows

// kSampled items drawn at random. The one of rank `rank` among them is most likely not among the k best of all; queries
// for which it is are searched a second time.
struct Sample {
    PackedRows items;
    int64_t rank;
};

// For each query the items that may still be among its k best. A list that is full makes room for itself.
struct Shortlists {
    int64_t capacity;
    float* floor;           // (queries,) items of a smaller score are left out
    int32_t* size;          // (queries,)
    Candidate* candidates;  // (queries, capacity)
};

// Consecutive rows of packed ones; `first` is a multiple of the level's panel_rows.
struct RowRange {
    int64_t first;
    int64_t last;
};

// One piece of work on the products of queries and items.
struct ItemTopkBlock {
    PackedRows queries;
    RowRange rows;
    PackedRows items;
    RowRange columns;
    int64_t first_item;  // the item of items' row 0
    bool mutual;         // items and queries are the same rows: each product is made once and is for both lists
    Shortlists lists;
};

// The kernels of one ISA level. `scratch` holds item_topk_scratch(...) floats.
struct ItemTopkKernels {
    int64_t panel_rows;
    int64_t (*panel_bytes)(int64_t dim);
    // Packs the items of the queries [rows.first, rows.last) (`item` null: these items) into row 0 on of `packed`.
    void (*pack)(const ItemTopk& task, const int64_t* item, RowRange rows, const PackedRows& packed);
    // Gives the queries in the rows their first floors.
    void (*start)(const ItemTopk& task, PackedRows queries, RowRange rows, const Sample& sample, const Shortlists& lists);
    void (*match)(const ItemTopk& task, const ItemTopkBlock& block, float* scratch);
    // Leaves the k best of each query in the rows, in any order and with their scores.
    void (*settle)(const ItemTopk& task, RowRange rows, const Shortlists& lists, float* scratch);
};

constexpr int64_t kItemTopkPad = 16;  // a vector of the widest level

static constexpr int64_t item_topk_scratch(int64_t dim, int64_t capacity) { return dim + capacity + 2 * kItemTopkPad; }

// A search in steps, short enough that whoever calls may be interrupted between them. What it finds does not depend on
// the number of threads.
class ItemTopkSearch {
public:
    ItemTopkSearch(const ItemTopk& task, int threads);
    ~ItemTopkSearch();

    // Takes the next step; false where there was none left.
    bool step();

private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace rellax
