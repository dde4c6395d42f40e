// The low-rank update of a frozen linear layer, gated per instance.
//
//     forward, onto y = x Wᵀ + bias     h = drop(x) Aᵀ        y += (s · h G) Bᵀ
//     backward, onto dx = dy W          dz = s · dy B         dG = Σ hᵀ dz        dh = dz Gᵀ        dx += drop(dh A)
//
// Both have one shape: rows shrink to r numbers, these meet a small matrix, and the result expands onto other rows.
// Dropout keeps or zeroes; its factor 1 / (1 - p) is part of h and of dh.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rellax {

// Element (i, j) is kept where mix(row(i) ^ column[j]) >= threshold, compared as signed numbers; the definition is
// keep_mask in reference/_numerics.py.
struct Dropout {
    const uint32_t* column;  // (padded d_in,) the columns' hashes, or null: nothing is dropped
    uint32_t seed;           // its low half; the high half is in `column`
    int32_t threshold;
    float factor;  // 1 / (1 - p)
};

// Plain pointers and sizes: what an ISA-compiled kernel may see. The rows of `down` and `up` are padded with zeros to
// `padded_columns`, and `down` has padded_components(r) rows, the last ones zero.
struct CfloraUpdate {
    Dtype dtype;          // of `from` and `to`: float32 or bfloat16
    int64_t r;
    int64_t d_from;       // forward d_in, backward d_out
    int64_t d_to;         // forward d_out, backward d_in
    const void* from;     // (T, d_from) x or dy
    int64_t from_stride;  // elements from row to row
    const float* down;    // (r, d_from) A or Bᵀ
    const float* up;      // (r, d_to) Bᵀ or A
    const float* gate;    // (B, r, r), or null: the identity
    float scale;
    Dropout dropout;
    void* to;      // (T, d_to) y or dx, or null: dx is not wanted
    float* h;      // (T, r) written by the forward pass, read by the backward pass
    float* dh;     // (T, r) written by the backward pass, or null
    float* z;      // (T, r) written by the backward pass, or null
    float* dgate;  // (tiles, r, r) each tile's share of dG, written by the backward pass, or null
};

// out (r, d) = left (T, r)ᵀ drop(right (T, d)): dA from dh and x, dB from z and dy.
struct CfloraOuter {
    Dtype dtype;  // of `right`: float32 or bfloat16
    int64_t tokens, r, d;
    const float* left;
    const void* right;
    int64_t right_stride;
    Dropout dropout;
    float* out;  // (padded_components(r), padded_columns(d))
};

// Consecutive tokens of one instance.
struct Tile {
    int64_t index, instance, first, last;
};

constexpr int64_t kTileTokens = 32;
constexpr int64_t kTileColumns = 128;  // of an outer product
constexpr int64_t kComponents = 4;     // of the rank, taken together
constexpr int64_t kTogether = 4;       // rows, taken together

constexpr int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }
constexpr int64_t padded_components(int64_t r) { return round_up(r, kComponents); }
constexpr int64_t padded_columns(int64_t d) { return round_up(d, 32); }

constexpr int64_t update_scratch(const CfloraUpdate& task) {
    return kTogether * padded_columns(task.d_from) + 2 * kTileTokens * task.r;
}
constexpr int64_t kOuterScratch = kTileTokens * kTileColumns;

using CfloraUpdateKernel = void(const CfloraUpdate& task, const Tile& tile, float* scratch);
using CfloraOuterKernel = void(const CfloraOuter& task, int64_t first_column, int64_t last_column, float* scratch);

// `offsets` (instances + 1,) rise from 0 to T; `dgate` (instances, r, r), or null. No result depends on `threads`.
void cflora_forward(const CfloraUpdate& task, const int64_t* offsets, int64_t instances, int threads);
void cflora_backward(CfloraUpdate task, const int64_t* offsets, int64_t instances, float* dgate, int threads);
void cflora_outer(const CfloraOuter& task, int threads);

}  // namespace rellax
