// What a head W (V, d) says about n rows h, in one pass over W and without a matrix of logits:
//
//     l_v = cap(h · W_v + bias_v)        lse = log Σ_v exp l_v        mean = Σ_v exp(l_v - lse) cap'(l_v) W_v
//
// lse and mean are what cross-entropy and its gradient need of the vocabulary. A slice of it keeps, for each row, the
// largest logit so far and both sums relative to that (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rellax {

// Plain pointers and sizes: what an ISA-compiled kernel may see.
struct Answer {
    Dtype dtype;  // of `rows` and `weight`: float32 or bfloat16
    int64_t n, d, vocabulary;
    const void* rows;  // (n, d)
    const void* weight;
    int64_t weight_stride;  // elements from row to row
    const float* bias;      // (V,) or null
    float softcap;          // cap(l) = softcap · tanh(l / softcap); 0: cap(l) = l
    float* lse;             // (n,)
    float* mean;            // (n, d), or null where it is not wanted
};

// The sums of one slice of the vocabulary: Σ exp(l - largest), and the same weighted by cap' W.
struct AnswerSums {
    float* largest;  // (n,)
    float* total;    // (n,)
    float* mean;     // (n, d), or null
};

constexpr int64_t kAnswerTile = 64;     // rows of W taken together
constexpr int64_t kAnswerSlice = 2048;  // rows of W to a slice

// Rows [first, last) of W. `scratch` holds n * kAnswerTile floats.
using AnswerKernel = void(const Answer& task, int64_t first, int64_t last, const AnswerSums& sums, float* scratch);

// The result does not depend on `threads`.
void answer_forward(const Answer& task, int threads);

}  // namespace rellax
