// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "answer.h"

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

constexpr int kTogether = 4;  // rows of h, and rows of W, whose dot products are taken together

// exp(x) for x <= 0; where that is less than 2^-126 it is 2^-126.
inline Floats exp_negative(Floats x) {
    const Floats power = x * 1.44269504f;
    return exp2(power < -126.0f ? Floats{} - 126.0f : power);
}

// Near 0, where nothing would be left of 1 - 1, by its series.
inline Floats tanh(Floats x) {
    const Floats square = x * x;
    const Floats series =
        x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
    const Floats magnitude = (Floats)((Words)x & 0x7fffffffu), small = exp_negative(-2.0f * magnitude);
    const Floats result = (Floats)((Words)((1.0f - small) / (1.0f + small)) | ((Words)x & 0x80000000u));
    return square < 0.09f ? series : result;
}

inline float sum(Floats values) {
    const Four four = fold(values);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// out[i * kAnswerTile + c] = rows_i · w[c] for kHeight rows of h.
template <int kHeight, class T>
inline void dots(const T* rows, const T* const (&w)[kTogether], int64_t d, float* out) {
    constexpr int kStep = kWidth * Operand<T>::kGroup;
    Floats products[kHeight][kTogether] = {};
    int64_t j = 0;
    for (; j + kStep <= d; j += kStep) {
        for (int c = 0; c < kTogether; ++c) {
            const auto right = load_operand(w[c] + j);
            for (int i = 0; i < kHeight; ++i) {
                products[i][c] = multiply_add(load_operand(rows + i * d + j), right, products[i][c]);
            }
        }
    }
    for (; j < d; j += kWidth) {
        const int64_t left = smaller(kWidth, d - j);
        for (int c = 0; c < kTogether; ++c) {
            const Floats right = load_some(w[c] + j, left);
            for (int i = 0; i < kHeight; ++i) products[i][c] += load_some(rows + i * d + j, left) * right;
        }
    }
    for (int i = 0; i < kHeight; ++i) {
        const Four four = sums(products[i]);
        __builtin_memcpy(out + i * kAnswerTile, &four, sizeof four);
    }
}

// The products of kHeight rows with a tile of W. What follows the last one is some number.
template <int kHeight, class T>
void multiply(const T* rows, const T* weight, int64_t weight_stride, int64_t d, int64_t count, float* out) {
    for (int64_t first = 0; first < count; first += kTogether) {
        const T* w[kTogether];
        for (int c = 0; c < kTogether; ++c) w[c] = weight + smaller(first + c, count - 1) * weight_stride;
        dots<kHeight>(rows, w, d, out + first);
    }
}

// Adds a tile of W to a row's sums: its products with the row become logits, and these what each row of W weighs in the
// row's mean. All is relative to the largest logit so far, to 0 while there are none but -inf; the factor that is
// returned turns what was relative to the largest before.
float weigh(const Answer& task, int64_t first, int64_t count, float* products, float* largest, float* total) {
    for (int64_t c = 0; c < count; c += kWidth) {
        Floats logits = load(products + c);
        if (task.bias != nullptr) logits += load_some(task.bias + first + c, smaller(kWidth, count - c));
        if (task.softcap != 0.0f) logits = task.softcap * tanh(logits / task.softcap);
        store(products + c, logits);
    }
    for (int64_t c = count; c < kAnswerTile; ++c) products[c] = -__builtin_inff();
    const float before = *largest;
    for (int64_t c = 0; c < count; ++c) *largest = products[c] > *largest ? products[c] : *largest;
    const float origin = *largest == -__builtin_inff() ? 0.0f : *largest;
    Floats parts = {};
    for (int64_t c = 0; c < kAnswerTile; c += kWidth) {
        const Floats logits = load(products + c), weights = exp_negative(logits - origin);
        const Floats capped = task.softcap == 0.0f ? Floats{} : logits / task.softcap;
        parts += weights;
        store(products + c, weights * (1.0f - capped * capped));
    }
    const float factor = exp_negative(Floats{} + (before - origin))[0];
    *total = factor * *total + sum(parts);
    return factor;
}

// Columns [j, j + kVectors * kWidth) of kHeight rows: mean = factor · mean + weights W, over `count` rows of W.
template <int kHeight, int kVectors, class T>
inline void add_block(const float* weights, const T* weight, int64_t weight_stride, int64_t count,
                      const float* factors, float* mean, int64_t d, int64_t j) {
    Floats sums[kHeight][kVectors];
    for (int i = 0; i < kHeight; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = factors[i] * load(mean + i * d + j + v * kWidth);
    }
    for (int64_t c = 0; c < count; ++c) {
        for (int v = 0; v < kVectors; ++v) {
            const Floats w = load(weight + c * weight_stride + j + v * kWidth);
            for (int i = 0; i < kHeight; ++i) sums[i][v] += weights[i * kAnswerTile + c] * w;
        }
    }
    for (int i = 0; i < kHeight; ++i) {
        for (int v = 0; v < kVectors; ++v) store(mean + i * d + j + v * kWidth, sums[i][v]);
    }
}

template <int kHeight, class T>
void add_tile(const float* weights, const T* weight, int64_t weight_stride, int64_t count, const float* factors,
              float* mean, int64_t d) {
    constexpr int kVectors = 4;
    int64_t j = 0;
    for (; j + kVectors * kWidth <= d; j += kVectors * kWidth) {
        add_block<kHeight, kVectors>(weights, weight, weight_stride, count, factors, mean, d, j);
    }
    for (; j + kWidth <= d; j += kWidth) {
        add_block<kHeight, 1>(weights, weight, weight_stride, count, factors, mean, d, j);
    }
    for (; j < d; ++j) {
        for (int i = 0; i < kHeight; ++i) {
            float sum = factors[i] * mean[i * d + j];
            for (int64_t c = 0; c < count; ++c) {
                const T* at = weight + c * weight_stride + j;
                sum += weights[i * kAnswerTile + c] * load_some(at, 1)[0];
            }
            mean[i * d + j] = sum;
        }
    }
}

// kHeight rows from row `row` on, against one tile of W.
template <int kHeight, class T>
void take(const Answer& task, int64_t row, int64_t first, int64_t count, const AnswerSums& sums, float* scratch) {
    const T* weight = static_cast<const T*>(task.weight) + first * task.weight_stride;
    multiply<kHeight>(static_cast<const T*>(task.rows) + row * task.d, weight, task.weight_stride, task.d, count, scratch);
    float factors[kHeight];
    for (int i = 0; i < kHeight; ++i) {
        factors[i] = weigh(task, first, count, scratch + i * kAnswerTile, sums.largest + row + i, sums.total + row + i);
    }
    if (sums.mean == nullptr) return;
    add_tile<kHeight>(scratch, weight, task.weight_stride, count, factors, sums.mean + row * task.d, task.d);
}

template <class T>
void slice(const Answer& task, int64_t first, int64_t last, const AnswerSums& sums, float* scratch) {
    for (int64_t row = 0; row < task.n; ++row) {
        sums.largest[row] = -__builtin_inff();
        sums.total[row] = 0.0f;
    }
    for (int64_t entry = 0; sums.mean != nullptr && entry < task.n * task.d; ++entry) sums.mean[entry] = 0.0f;
    for (; first < last; first += kAnswerTile) {
        const int64_t count = smaller(kAnswerTile, last - first);
        int64_t row = 0;
        for (; row + kTogether <= task.n; row += kTogether) take<kTogether, T>(task, row, first, count, sums, scratch);
        for (; row < task.n; ++row) take<1, T>(task, row, first, count, sums, scratch);
    }
}

}  // namespace

void answer(const Answer& task, int64_t first, int64_t last, const AnswerSums& sums, float* scratch) {
    task.dtype == Dtype::float32 ? slice<float>(task, first, last, sums, scratch)
                                 : slice<BFloat16>(task, first, last, sums, scratch);
}

}  // namespace rellax::RELLAX_LEVEL
