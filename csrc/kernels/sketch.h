// Rows in 8 bits a component, a quarter of what fp32 takes from memory, and approximate dot products of another row
// with them, each with a bound on its error as in similarity.h. Included by the kernels inside their level's
// compilation only, in that level's namespace.
//
// kSketchBlock components of a row share a scale, so that a few large ones don't take the others' digits:
//
//     Bound bound = make_sketch(row, dim, sketch);
//     SketchQuery query = sketch_query(other_row, dim, worst.residual, halves);
//     sketch_scores(query, rows, later_rows, dim, scores);    of kSketchRows rows
//     |scores[i] - exact| <= score_error(query.bound, worst, dim)
//
// where `worst` is at least the bound of each row. The score of a row with less of a residual is lowered by the
// difference that this makes, so that score + error is the least upper bound for it too.
#pragma once

#include <cstdint>

#include "history_topk.h"
#include "select.h"
#include "similarity.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace rellax::RELLAX_LEVEL {
namespace {

// Rows that share a pass over the query's: as many as their sums fit in registers.
constexpr int kSketchRows = kWidth == 16 ? 8 : 4;
constexpr int kPairs = 2 * kWidth;
static_assert(kSketchBlock % kPairs == 0);

using Bytes = int8_t __attribute__((vector_size(kPairs)));
using Shorts = int16_t __attribute__((vector_size(kPairs * sizeof(int16_t))));

// A row in 16 bits a component, whose error hardly adds to the other's.
struct SketchQuery {
    const int16_t* values;
    float scale;
    float worst_residual;  // of the rows
    Bound bound;
};

inline Shorts load_shorts(const int16_t* source) {
    Shorts shorts;
    __builtin_memcpy(&shorts, source, sizeof shorts);
    return shorts;
}

// GCC splits the conversion in two where it is not told the instruction.
inline Shorts load_shorts(const int8_t* source) {
    Bytes bytes;
    __builtin_memcpy(&bytes, source, sizeof bytes);
#if defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepi8_epi16((__m256i)bytes);
#elif defined(__AVX2__)
    return (Shorts)_mm256_cvtepi8_epi16((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, Shorts);
#endif
}

// Adds the products of neighbours in pairs.
inline Integers multiply_add(Shorts a, Shorts b, Integers sum) {
#if defined(__AVX512BW__)
    return sum + (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const auto low = [](Shorts pairs) { return ((Integers)pairs << 16) >> 16; };
    const auto high = [](Shorts pairs) { return (Integers)pairs >> 16; };
    return sum + low(a) * low(b) + high(a) * high(b);
#endif
}

// The whole numbers that are nearest to values of less than 2^22.
inline Integers nearest(Floats values) {
    constexpr float kRound = 0x1.8p23f;  // what is added to it is rounded to a whole number, in its lowest bits
    return (Integers)(values + kRound) - (Integers)(Floats{} + kRound);
}

// Of which `steps` are as long as the largest of some values; 0 where that is next to nothing, or infinite.
struct Step {
    float size, inverse;

    Step(Floats magnitudes, float steps) {
        const float largest = largest_in(magnitudes);
        const bool usable = 0x1p-100f < largest && largest < __builtin_inff();
        size = usable ? largest / steps : 0.0f;
        inverse = usable ? steps / largest : 0.0f;
    }
};

// `values` has sketch_bytes(dim): zeros for what is past dim in the last block, then the scales of all blocks and the
// row's residual.
template <class T>
inline Bound make_sketch(const T* row, int64_t dim, int8_t* values) {
    constexpr int kParts = kSketchBlock / kWidth;
    using Narrow = int8_t __attribute__((vector_size(kWidth)));
    float* scales = reinterpret_cast<float*>(values + sketch_width(dim));
    Squares squares;
    for (int64_t d = 0; d < dim; d += kSketchBlock) {
        Floats parts[kParts], magnitudes = {};
        for (int part = 0; part < kParts; ++part) {
            parts[part] = load_most(row + d + part * kWidth, dim - d - part * kWidth);
            magnitudes = larger(magnitude(parts[part]), magnitudes);
        }
        const Step step(magnitudes, 127.0f);
        *scales++ = step.size;
        for (int part = 0; part < kParts; ++part, values += kWidth) {
            const Integers steps = nearest(parts[part] * step.inverse);
            const Narrow narrow = __builtin_convertvector(steps, Narrow);
            __builtin_memcpy(values, &narrow, sizeof narrow);
            squares.add(parts[part], __builtin_convertvector(steps, Floats) * step.size);
        }
    }
    const Bound bound = squares.bound(dim);
    *scales = bound.residual;
    return bound;
}

// `values` has room for sketch_width(dim) of them.
inline SketchQuery sketch_query(const float* row, int64_t dim, float worst_residual, int16_t* values) {
    using Narrow = int16_t __attribute__((vector_size(kWidth * sizeof(int16_t))));
    Floats magnitudes = {};
    for (int64_t d = 0; d < dim; d += kWidth) magnitudes = larger(magnitude(load_most(row + d, dim - d)), magnitudes);
    const Step step(magnitudes, 32767.0f);
    Squares squares;
    for (int64_t d = 0; d < sketch_width(dim); d += kWidth) {
        const Floats exact = load_most(row + d, dim - d);
        const Integers steps = nearest(exact * step.inverse);
        const Narrow narrow = __builtin_convertvector(steps, Narrow);
        __builtin_memcpy(values + d, &narrow, sizeof narrow);
        squares.add(exact, __builtin_convertvector(steps, Floats) * step.size);
    }
    return {values, step.size, worst_residual, squares.bound(dim)};
}

// Asks for a row, block by block as another one is read.
inline void ask_for_block(const int8_t* row, int64_t block) { __builtin_prefetch(row + block * kSketchBlock, 0, 2); }

// Lanes of a score but for the query's scale. The blocks are read from both ends in turn: where they are read in order
// the processor asks for what lies behind the row as well, in vain, and rows from memory take twice the time.
inline Floats sketch_lanes(const int16_t* query, const int8_t* row, const int8_t* later, int64_t dim) {
    const int64_t blocks = sketch_blocks(dim);
    const float* const scales = reinterpret_cast<const float*>(row + blocks * kSketchBlock);
    Floats lanes = {};
    ask_for_block(later, blocks);
    for (int64_t turn = 0; turn < blocks; ++turn) {
        const int64_t block = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
        ask_for_block(later, block);
        Integers products = {};
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSketchBlock; i += kPairs) {
            const int64_t d = block * kSketchBlock + i;
            products = multiply_add(load_shorts(query + d), load_shorts(row + d), products);
        }
        lanes += __builtin_convertvector(products, Floats) * scales[block];
    }
    return lanes;
}

inline float sketch_residual(const int8_t* row, int64_t dim) {
    return reinterpret_cast<const float*>(row + sketch_width(dim))[sketch_blocks(dim)];
}

// Not inlined where it would lack registers.
[[gnu::noinline]] inline void sketch_scores(SketchQuery query, const int8_t* const* rows, const int8_t* const* later,
                                            int64_t dim, float* scores) {
    for (int row = 0; row < kSketchRows; row += 4) {
        Floats lanes[4];
        Four less;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            lanes[i] = sketch_lanes(query.values, rows[row + i], later[row + i], dim);
            less[i] = query.worst_residual - sketch_residual(rows[row + i], dim);
        }
        const Four four = sums(lanes) * query.scale - less * query.bound.norm;
        __builtin_memcpy(scores + row, &four, sizeof four);
    }
}

}  // namespace
}  // namespace rellax::RELLAX_LEVEL
