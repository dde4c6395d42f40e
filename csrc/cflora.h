// The low-rank updates of frozen linear layers that read the same x, gated per instance. For each layer, with A and B
// of its own:
//
//     forward      h = drop(x) Aᵀ    z = s · h G       y = base + z Bᵀ
//     backward     dz = s · dy B     dG = Σ hᵀ dz      dh = dz Gᵀ           dx += drop(dh A)
//
// Rows shrink to r numbers per layer, these meet a small matrix, and the result expands to other rows. Dropout keeps or
// zeroes; its factor 1 / (1 - p) is part of h and of dh. The products with W come first: their rows, y and dx, are still
// in the cache when the update is added to them (docs/cflora.md has the figures).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rellax {

// Element (i, j) is kept where mix(row(i) ^ column[j]) >= threshold, compared as signed numbers; the definition is
// keep_mask in reference/_numerics.py.
struct Dropout {
    const uint32_t* column;  // (padded_columns(d_in),) the columns' hashes, or null: nothing is dropped
    uint32_t seed;           // its low half; the high half is in `column`
    int32_t threshold;
    float factor;  // 1 / (1 - p)
};

// A factor as its owner keeps it: components (c, d) in the rows' dtype, with a stride for each, in elements.
struct CfloraFactor {
    const void* at;
    int64_t component, column;
};

// Kernels read factors padded with zeros to whole blocks of kComponents components and kBlock columns, in one of two
// forms, both walked from front to back:
//     shrinking   (components / kComponents, columns / kBlock, kComponents, kBlock)
//     expanding   (columns / kBlock, components, kBlock), in bfloat16 (columns / kBlock, components / 2, kBlock, 2):
//                 pairs of components side by side, as dot products of pairs take them
struct CfloraLayer {
    int64_t d;         // d_out
    void* rows;        // (T, d): y, written, or dy, read
    int64_t stride;    // elements from row to row
    const void* base;  // forward: (T, d), `rows` itself perhaps, or null: zeros
    int64_t base_stride;
    CfloraFactor a, b;     // A (r, d_in), Bᵀ (r, d)
    const float* gate;     // (B, r, r), or null: the identity
    const void* packed_b;  // expanding in the forward pass, shrinking in the backward pass; set on the way, as is
    float* dgate;          // (tiles, r, r) each tile's share of dG, written by the backward pass, or null
};

// Plain pointers and sizes: what an ISA-compiled kernel may see.
struct Cflora {
    Dtype dtype;  // of all rows and components: float32 or bfloat16
    int64_t r, layers;
    const CfloraLayer* layer;
    int64_t d_in;
    void* x;           // (T, d_in): x, read, or dx, written; null where dx is not wanted
    int64_t x_stride;  // elements from row to row
    bool accumulate;   // backward: dx is added to what is there
    float scale;
    Dropout dropout;
    float* h;   // (T, layers r) written by the forward pass, read by the backward pass
    float* dh;  // (T, layers r) written by the backward pass, or null
    float* z;   // (T, layers r) written by the backward pass, or null
    const void* packed_a;  // all layers' (layers r, d_in): shrinking in the forward pass, expanding in the backward pass
};

// out (c, d) = left (T, c)ᵀ drop(right (T, d)): dA from dh and x, dB from z and dy.
struct CfloraOuter {
    Dtype dtype;  // of `right`: float32 or bfloat16
    int64_t tokens, components, d;
    const float* left;
    int64_t left_stride;
    const void* right;
    int64_t right_stride;
    Dropout dropout;
    float* out;  // (padded_components(c), padded_columns(d))
};

// Consecutive tokens of one instance.
struct Tile {
    int64_t index, instance, first, last;
};

constexpr int64_t kTileTokens = 32;
constexpr int64_t kBlock = 32;         // columns of a matrix that lie together
constexpr int64_t kTileColumns = 128;  // of an outer product
constexpr int64_t kComponents = 4;     // taken together, as are
constexpr int64_t kTogether = 4;       // rows

static constexpr int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
static constexpr int64_t padded_components(int64_t count) { return round_up(count, kComponents); }
static constexpr int64_t padded_columns(int64_t d) { return round_up(d, kBlock); }

// Floats that a tile needs: rows staged for shrinking, three blocks of r numbers a layer and token.
static constexpr int64_t cflora_scratch(int64_t widest, int64_t components) {
    return kTileTokens * padded_columns(widest) + 3 * kTileTokens * padded_components(components);
}
constexpr int64_t kOuterScratch = kTileTokens * kTileColumns;

using CfloraKernel = void(const Cflora& task, const Tile& tile, float* scratch);
using CfloraOuterKernel = void(const CfloraOuter& task, int64_t first_column, int64_t last_column, float* scratch);

// `offsets` (instances + 1,) rise from 0 to T. No result depends on `threads`.
void cflora_forward(const Cflora& task, const int64_t* offsets, int64_t instances, int threads);

// Each layer's dG (instances, r, r) is written to `dgates`, where that is not null.
void cflora_backward(const Cflora& task, const int64_t* offsets, int64_t instances, float* const* dgates, int threads);

void cflora_outer(const CfloraOuter& task, int threads);

}  // namespace rellax
