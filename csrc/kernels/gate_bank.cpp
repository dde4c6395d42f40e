// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "gate_bank.h"

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

template <int... kLane>
struct Lanes {};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

// In every 2 * kHalf lanes: the halves of a, added up, then the halves of b.
template <int kHalf, int... kLane>
inline Floats add_halves(Floats a, Floats b, Lanes<kLane...>) {
    return __builtin_shufflevector(a, b, (kLane % (2 * kHalf) < kHalf ? kLane : kLane - kHalf + kWidth)...) +
           __builtin_shufflevector(a, b, (kLane % (2 * kHalf) < kHalf ? kLane + kHalf : kLane + kWidth)...);
}

// Lane l of the result is the sum of the lanes of vectors[l].
template <int kCount>
inline Floats sum_each(Floats* vectors) {
    if constexpr (kCount > 1) {
        constexpr int kHalf = kCount / 2;
        for (int i = 0; i < kHalf; ++i) vectors[i] = add_halves<kHalf>(vectors[i], vectors[i + kHalf], AllLanes());
        return sum_each<kHalf>(vectors);
    }
    return vectors[0];
}

// The first `count` elements; no more than kWidth are taken.
template <class T>
inline Floats load_most(const T* source, int64_t count) {
    return count >= kWidth ? load(source) : load_some(source, count);
}

template <class T>
inline void store_most(T* target, Floats values, int64_t count) {
    count >= kWidth ? store(target, values) : store_some(target, values, count);
}

// 2^x for -126 <= x <= 0: 2^f by a polynomial for the rest f after rounding, relative error 2e-9.
inline Floats exp2(Floats x) {
    constexpr float kRound = 0x1.8p23f;  // what is added to it is rounded to a whole number, in its lowest bits
    const Floats shifted = x + kRound, f = x - (shifted - kRound);
    Floats power = 0.00015345812f * f + 0.00133999313f;
    power = power * f + 0.00961848896f;
    power = power * f + 0.0555032878f;
    power = power * f + 0.240226469f;
    power = power * f + 0.693147206f;
    power = power * f + 1.0f;
    return (Floats)((Integers)power + ((Integers)shifted << 23));
}

// The normal distribution: GELU(x) = x Φ(x), and its derivative is Φ(x) + x φ(x).
struct Normal {
    Floats cdf, density;
};

// Φ(-y) exp(y²/2) is smooth for all y >= 0 in t = (y - K) / (y + K), as J. L. Schonfelder, Math. Comp. 32 (1978), uses
// it for erfc. The polynomial, for K = 3, is a minimax fit of Φ: error 3e-9, where the rounding of fp32 brings 6e-8.
inline Normal normal(Floats x) {
    const Floats magnitude = (Floats)((Words)x & 0x7fffffffu);
    const Floats y = magnitude < 12.0f ? magnitude : 12.0f;  // Φ(-12) < 1e-32
    const Floats bell = exp2(-0.72134752f * y * y);
    const Floats inverse = 1.0f / (y + 3.0f), t = (y - 3.0f) * inverse;
    Floats tail = 0.00198272001f * t + 0.00677748317f;
    tail = tail * t - 0.0113714778f;
    tail = tail * t - 0.0479125006f;
    tail = tail * t + 0.22980936f;
    tail = tail * t - 0.509362155f;
    tail = tail * t + 0.729082234f;
    tail *= bell * inverse;
    return {x < 0.0f ? tail : 1.0f - tail, 0.39894228f * bell};
}

// sums[l] += the lanes of row · right[l], for kCount rows of `right`. The row has zeros up to the next multiple of kWidth.
template <int kCount, class T>
inline void multiply_lanes(const float* row, const T* right, int64_t right_stride, int64_t inner, Floats* sums) {
    for (int64_t k = 0; k < inner; k += kWidth) {
        const Floats values = load(row + k);
        if (inner - k >= kWidth) {
            for (int l = 0; l < kCount; ++l) sums[l] += values * load(right + l * right_stride + k);
        } else {
            for (int l = 0; l < kCount; ++l) sums[l] += values * load_some(right + l * right_stride + k, inner - k);
        }
    }
}

// out (rows, count) += left (rows, inner) rightᵀ, with right (count, inner).
template <class T>
void add_dots(const float* left, int64_t left_stride, int64_t rows, const T* right, int64_t right_stride,
              int64_t count, int64_t inner, float* out, int64_t out_stride) {
    int64_t j = 0;
    for (; j + kWidth <= count; j += kWidth) {
        for (int64_t i = 0; i < rows; ++i) {
            Floats sums[kWidth] = {};
            multiply_lanes<kWidth>(left + i * left_stride, right + j * right_stride, right_stride, inner, sums);
            float* at = out + i * out_stride + j;
            store(at, load(at) + sum_each<kWidth>(sums));
        }
    }
    for (; j < count; ++j) {
        for (int64_t i = 0; i < rows; ++i) {
            Floats sums[1] = {};
            multiply_lanes<1>(left + i * left_stride, right + j * right_stride, right_stride, inner, sums);
            out[i * out_stride + j] += sum(sums[0]);
        }
    }
}

// A matrix whose element (i, k) is at[i * row + k * step].
struct Left {
    const float* at;
    int64_t row, step;
};

// Columns [0, kVectors * kWidth) of kHeight rows of out = left right, as far as there are `columns`.
template <int kHeight, int kVectors, bool kWhole, class R, class O>
inline void multiply_block(Left left, const R* right, int64_t right_stride, int64_t inner, O* out, int64_t out_stride,
                           int64_t columns) {
    Floats sums[kHeight][kVectors] = {};
    for (int64_t k = 0; k < inner; ++k) {
        for (int v = 0; v < kVectors; ++v) {
            const R* from = right + k * right_stride + v * kWidth;
            const Floats values = kWhole ? load(from) : load_some(from, columns);
            for (int i = 0; i < kHeight; ++i) sums[i][v] += left.at[i * left.row + k * left.step] * values;
        }
    }
    for (int i = 0; i < kHeight; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            O* to = out + i * out_stride + v * kWidth;
            kWhole ? store(to, sums[i][v]) : store_some(to, sums[i][v], columns);
        }
    }
}

template <int kVectors, bool kWhole, class R, class O>
void multiply_columns(Left left, int64_t rows, const R* right, int64_t right_stride, int64_t inner, O* out,
                      int64_t out_stride, int64_t columns) {
    constexpr int kHeight = 4;
    int64_t i = 0;
    for (; i + kHeight <= rows; i += kHeight) {
        const Left block = {left.at + i * left.row, left.row, left.step};
        multiply_block<kHeight, kVectors, kWhole>(block, right, right_stride, inner, out + i * out_stride, out_stride,
                                                  columns);
    }
    for (; i < rows; ++i) {
        const Left row = {left.at + i * left.row, left.row, left.step};
        multiply_block<1, kVectors, kWhole>(row, right, right_stride, inner, out + i * out_stride, out_stride, columns);
    }
}

// out (rows, columns) = left (rows, inner) right (inner, columns).
template <class R, class O>
void multiply(Left left, int64_t rows, const R* right, int64_t right_stride, int64_t inner, O* out,
              int64_t out_stride, int64_t columns) {
    constexpr int kVectors = kWidth == 16 ? 4 : 2;  // with kHeight rows, as many sums as registers allow
    int64_t j = 0;
    for (; j + kVectors * kWidth <= columns; j += kVectors * kWidth) {
        multiply_columns<kVectors, true>(left, rows, right + j, right_stride, inner, out + j, out_stride, 0);
    }
    for (; j + kWidth <= columns; j += kWidth) {
        multiply_columns<1, true>(left, rows, right + j, right_stride, inner, out + j, out_stride, 0);
    }
    if (j < columns) {
        multiply_columns<1, false>(left, rows, right + j, right_stride, inner, out + j, out_stride, columns - j);
    }
}

// out (columns,) = the sum of the rows of `from` (rows, columns).
template <class O>
void sum_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, O* out) {
    for (int64_t j = 0; j < columns; j += kWidth) {
        Floats total = {};
        for (int64_t i = 0; i < rows; ++i) total += load_most(from + i * stride + j, columns - j);
        store_most(out + j, total, columns - j);
    }
}

// One projection's parameters.
template <class T>
struct Projection {
    Projection(const GateBank& bank, int64_t m)
        : ln_weight(static_cast<const T*>(bank.ln_weight) + m * bank.d_u),
          ln_bias(static_cast<const T*>(bank.ln_bias) + m * bank.d_u),
          w1(static_cast<const T*>(bank.w1) + m * bank.hidden * bank.d_u),
          b1(static_cast<const T*>(bank.b1) + m * bank.hidden),
          w2(static_cast<const T*>(bank.w2) + m * bank.outputs * bank.hidden) {}
    const T *ln_weight, *ln_bias, *w1, *b1, *w2;
};

// x = x̂ ∘ v + c, with zeros past d_u.
template <class T>
void affine(const GateBank& bank, const Projection<T>& projection, const float* normed, int64_t rows, float* x) {
    const int64_t stride = padded_embedding(bank.d_u);
    for (int64_t d = 0; d < bank.d_u; d += kWidth) {
        const Floats weight = load_most(projection.ln_weight + d, bank.d_u - d);
        const Floats bias = load_most(projection.ln_bias + d, bank.d_u - d);
        for (int64_t b = 0; b < rows; ++b) store(x + b * stride + d, load(normed + b * stride + d) * weight + bias);
    }
}

// a = x W1ᵀ + b1 for the hidden units [first, first + count), with zeros up to the next multiple of kWidth.
template <class T>
void hidden_layer(const GateBank& bank, const Projection<T>& projection, const float* x, int64_t rows, int64_t first,
                  int64_t count, float* a) {
    for (int64_t j = 0; j < count; j += kWidth) {
        const Floats bias = load_most(projection.b1 + first + j, count - j);
        for (int64_t b = 0; b < rows; ++b) store(a + b * kTileHidden + j, bias);
    }
    add_dots(x, padded_embedding(bank.d_u), rows, projection.w1 + first * bank.d_u, bank.d_u, count, bank.d_u, a,
             kTileHidden);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void forward(const GateBank& bank, const T* b2, float* flat, const float* normed, int64_t m, int64_t first,
             int64_t last, float* scratch) {
    const Projection<T> projection(bank, m);
    const int64_t rows = last - first, stride = padded_embedding(bank.d_u), n = bank.outputs;
    float *x = scratch, *hidden = x + kTileInstances * stride;
    flat += (m * bank.instances + first) * n;
    affine(bank, projection, normed + first * stride, rows, x);
    for (int64_t b = 0; b < rows; ++b) {
        for (int64_t j = 0; j < n; j += kWidth) {
            store_most(flat + b * n + j, load_most(b2 + m * n + j, n - j), n - j);
        }
    }
    for (int64_t h = 0; h < bank.hidden; h += kTileHidden) {
        const int64_t count = least(kTileHidden, bank.hidden - h);
        hidden_layer(bank, projection, x, rows, h, count, hidden);
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t j = 0; j < count; j += kWidth) {
                const Floats a = load(hidden + b * kTileHidden + j);
                store(hidden + b * kTileHidden + j, a * normal(a).cdf);
            }
        }
        add_dots(hidden, kTileHidden, rows, projection.w2 + h, bank.hidden, n, count, flat, n);
    }
}

template <class T>
void backward(const GateBank& bank, const GateBankGradients& gradients, const float* normed, float* dnormed, int64_t m,
              float* scratch) {
    const Projection<T> projection(bank, m);
    const int64_t rows = bank.instances, stride = padded_embedding(bank.d_u), n = bank.outputs;
    float *x = scratch, *dx = x + rows * stride, *g = dx + rows * stride, *da = g + rows * kTileHidden;
    float *outer = da + rows * kTileHidden, *dln_weight = outer + kTileHidden * stride, *dln_bias = dln_weight + stride;
    const float* dflat = gradients.dflat + m * rows * n;
    T* dw1 = static_cast<T*>(gradients.dw1) + m * bank.hidden * bank.d_u;
    T* db1 = static_cast<T*>(gradients.db1) + m * bank.hidden;
    T* dw2 = static_cast<T*>(gradients.dw2) + m * n * bank.hidden;
    affine(bank, projection, normed, rows, x);
    for (int64_t d = 0; d < 2 * stride; ++d) dln_weight[d] = 0.0f;
    sum_rows(dflat, n, rows, n, static_cast<T*>(gradients.db2) + m * n);

    for (int64_t h = 0; h < bank.hidden; h += kTileHidden) {
        const int64_t count = least(kTileHidden, bank.hidden - h);
        const T* w1 = projection.w1 + h * bank.d_u;
        hidden_layer(bank, projection, x, rows, h, count, g);
        multiply({dflat, n, 1}, rows, projection.w2 + h, bank.hidden, n, da, kTileHidden, count);
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t j = 0; j < count; j += kWidth) {
                const int64_t at = b * kTileHidden + j;
                const Floats a = load(g + at);
                const Normal gauss = normal(a);
                store(g + at, a * gauss.cdf);
                store(da + at, load(da + at) * (gauss.cdf + a * gauss.density));
            }
        }
        multiply({dflat, 1, n}, n, g, kTileHidden, rows, dw2 + h, bank.hidden, count);
        float sums[kTileHidden] = {};
        sum_rows(da, kTileHidden, rows, count, sums);
        for (int64_t j = 0; j < count; j += kWidth) store_most(db1 + h + j, load(sums + j), count - j);
        multiply({da, 1, kTileHidden}, count, normed, stride, rows, outer, stride, bank.d_u);
        for (int64_t d = 0; d < bank.d_u; d += kWidth) {
            const int64_t left = bank.d_u - d;
            const Floats weight = load_most(projection.ln_weight + d, left);
            const Floats bias = load_most(projection.ln_bias + d, left);
            Floats dweight = load(dln_weight + d), dbias = load(dln_bias + d);
            for (int64_t j = 0; j < count; ++j) {
                const Floats w = load_most(w1 + j * bank.d_u + d, left), product = load(outer + j * stride + d);
                store_most(dw1 + (h + j) * bank.d_u + d, product * weight + sums[j] * bias, left);
                dweight += w * product;
                dbias += w * sums[j];
            }
            store(dln_weight + d, dweight);
            store(dln_bias + d, dbias);
        }
        if (dnormed != nullptr) {
            multiply({da, kTileHidden, 1}, rows, w1, bank.d_u, count, dx, stride, bank.d_u);
            for (int64_t d = 0; d < bank.d_u; d += kWidth) {
                const Floats weight = load_most(projection.ln_weight + d, bank.d_u - d);
                for (int64_t b = 0; b < rows; ++b) {
                    float* at = dnormed + b * stride + d;
                    store(at, load(at) + load(dx + b * stride + d) * weight);
                }
            }
        }
    }
    for (int64_t d = 0; d < bank.d_u; d += kWidth) {
        const int64_t at = m * bank.d_u + d;
        store_most(static_cast<T*>(gradients.dln_weight) + at, load(dln_weight + d), bank.d_u - d);
        store_most(static_cast<T*>(gradients.dln_bias) + at, load(dln_bias + d), bank.d_u - d);
    }
}

}  // namespace

void gate_bank_forward(const GateBank& bank, const void* b2, float* flat, const float* normed, int64_t projection,
                       int64_t first, int64_t last, float* scratch) {
    bank.dtype == Dtype::float32
        ? forward<float>(bank, static_cast<const float*>(b2), flat, normed, projection, first, last, scratch)
        : forward<BFloat16>(bank, static_cast<const BFloat16*>(b2), flat, normed, projection, first, last, scratch);
}

void gate_bank_backward(const GateBank& bank, const GateBankGradients& gradients, const float* normed, float* dnormed,
                        int64_t projection, float* scratch) {
    bank.dtype == Dtype::float32 ? backward<float>(bank, gradients, normed, dnormed, projection, scratch)
                                 : backward<BFloat16>(bank, gradients, normed, dnormed, projection, scratch);
}

}  // namespace rellax::RELLAX_LEVEL
