// Approximate dot products of many rows with many others, each with a bound on its error. Included by the kernels
// inside their level's compilation only, in that level's namespace.
//
// Rows are packed into panels of kPanelRows: in bfloat16 where the level multiplies it, else in fp32. A panel serves
// both sides of a product, so what is packed once is a block of queries and a block of candidates:
//
//     Bound bounds[kPanelRows];
//     pack_panel(rows, count, dim, panel, bounds);                    panel: panel_size(dim) elements, 64-byte aligned
//     score_tile(tile_queries(panel, 8), other_panel, dim, out, stride);   rows 8 ... 8 + kTileRows of the panel
//     |out[i * stride + j] - exact| <= score_error(bounds[8 + i], other_bounds[j], dim)
//
// The exact score is any fp32 dot product of the unpacked rows, summed in whatever order. The bound holds where it is
// finite; it is infinite or NaN where a row has such elements or its squares overflow.
#pragma once

#include <cstdint>

#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rellax::RELLAX_LEVEL {
namespace {

#if defined(__AVX512BF16__)
using Packed = BFloat16;
#else
using Packed = float;
#endif

// A tile's sums fill half of the registers, enough to hide the latency of their additions.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanelVectors = 2;
constexpr int kPanelRows = kPanelVectors * kWidth;  // also the columns of a tile
constexpr int kGroup = Operand<Packed>::kGroup;     // neighbouring elements that are multiplied together, one word

// Upper bounds on |x| and on |x - packed x|.
struct Bound {
    float norm, residual;
};

constexpr int64_t packed_groups(int64_t dim) { return (dim + kGroup - 1) / kGroup; }
constexpr int64_t panel_size(int64_t dim) { return packed_groups(dim) * kGroup * kPanelRows; }

// The word of each group of row `first` on: word `group * kPanelRows + row` of a panel is the group of that row.
inline const Packed* tile_queries(const Packed* panel, int64_t first) { return panel + first * kGroup; }

inline Floats fused_multiply_add(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

[[maybe_unused]] inline Floats fused_multiply_add(Words a, Words b, Floats sum) { return multiply_add(a, b, sum); }

// out[i * stride + j] = the product of row i of the queries and row j of the panel, kTileRows x kPanelRows of them.
inline void score_tile(const Packed* queries, const Packed* panel, int64_t dim, float* out, int64_t stride) {
    using Group = Operand<Packed>;
    Floats sums[kTileRows][kPanelVectors] = {};
    for (int64_t group = packed_groups(dim); group > 0; --group) {
        const auto first = load_operand(panel), second = load_operand(panel + kWidth * kGroup);
        for (int row = 0; row < kTileRows; ++row) {
            const auto query = Group::broadcast(queries + row * kGroup);
            sums[row][0] = fused_multiply_add(query, first, sums[row][0]);
            sums[row][1] = fused_multiply_add(query, second, sums[row][1]);
        }
        queries += kPanelRows * kGroup;
        panel += kPanelRows * kGroup;
    }
    for (int row = 0; row < kTileRows; ++row) {
        store(out + row * stride, sums[row][0]);
        store(out + row * stride + kWidth, sums[row][1]);
    }
}

// Squares of a row and of what packing took from it, summed in kWidth places.
struct Squares {
    Floats norm = {}, residual = {};

    void add(Floats exact, Floats packed) {
        norm += exact * exact;
        residual += (exact - packed) * (exact - packed);
    }

    // The squares' own rounding, underflow included, can't make the bound too small.
    Bound bound(int64_t dim) const {
        const float relative = 1.0f + static_cast<float>(dim + 64) * 0x1p-23f;
        const float absolute = static_cast<float>(dim) * 0x1p-126f;
        const Four norms = fold(norm), residuals = fold(residual);
        const float norm_squared = (norms[0] + norms[1]) + (norms[2] + norms[3]);
        const float residual_squared = (residuals[0] + residuals[1]) + (residuals[2] + residuals[3]);
        return {__builtin_sqrtf(norm_squared + absolute) * relative,
                __builtin_sqrtf(residual_squared + absolute) * relative};
    }
};

// The next kWidth words of a row as they are packed.
template <class T>
inline Words pack_words(const T* source, Squares& squares) {
    Packed packed[kWidth * kGroup];
    for (int part = 0; part < kGroup; ++part) {
        const Floats exact = load(source + part * kWidth);
        store(packed + part * kWidth, exact);
        squares.add(exact, load(packed + part * kWidth));
    }
    Words words;
    __builtin_memcpy(&words, packed, sizeof words);
    return words;
}

// The rows of one vector of a panel, `count` <= kWidth of them; the others become zero.
template <class T>
inline void pack_vector(const T* const* rows, int count, int64_t dim, Packed* panel, Bound* bounds) {
    constexpr int64_t kElements = kWidth * kGroup;
    Squares squares[kWidth];
    for (int64_t d = 0; d < dim; d += kElements) {
        Words block[kWidth] = {};
        for (int row = 0; row < count; ++row) {
            if (d + kElements <= dim) {
                block[row] = pack_words(rows[row] + d, squares[row]);
            } else {
                T rest[kElements] = {};
                __builtin_memcpy(rest, rows[row] + d, (dim - d) * sizeof(T));
                block[row] = pack_words(rest, squares[row]);
            }
        }
        transpose(block, AllLanes());
        const int64_t words = smaller(packed_groups(dim - d), kWidth);
        for (int64_t word = 0; word < words; ++word) {
            __builtin_memcpy(panel + (d / kGroup + word) * kPanelRows * kGroup, &block[word], sizeof(Words));
        }
    }
    for (int row = 0; row < kWidth; ++row) bounds[row] = row < count ? squares[row].bound(dim) : Bound{0, 0};
}

// Packs rows[0 ... count), count <= kPanelRows; the panel's other rows are zero, and so are their bounds.
template <class T>
inline void pack_panel(const T* const* rows, int count, int64_t dim, Packed* panel, Bound* bounds) {
    for (int first = 0; first < kPanelRows; first += kWidth) {
        const int rest = count - first < 0 ? 0 : count - first;
        pack_vector(rows + first, rest < kWidth ? rest : kWidth, dim, panel + first * kGroup, bounds + first);
    }
}

// How far a score of the packed rows may be from the exact one: by the triangle inequality what packing takes from
// either row, and for both scores the rounding of `dim` products and additions.
inline float score_error(Bound query, Bound candidate, int64_t dim) {
    const float query_norm = query.norm + query.residual, candidate_norm = candidate.norm + candidate.residual;
    const float rounding = static_cast<float>(dim + 32) * 0x1p-23f;
    const float packing = query.residual * candidate.norm + query_norm * candidate.residual;
    return 1.001f * (packing + rounding * query_norm * candidate_norm) + static_cast<float>(dim) * 0x1p-120f;
}

}  // namespace
}  // namespace rellax::RELLAX_LEVEL
