// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "gate_bank.h"

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

// The normal distribution: GELU(x) = x Φ(x), and its derivative is Φ(x) + x φ(x).
struct Normal {
    Floats cdf, density;
};

// Φ(-y) exp(y²/2) is smooth for all y >= 0 in t = (y - K) / (y + K), as J. L. Schonfelder, Math. Comp. 32 (1978), uses
// it for erfc. The polynomial, for K = 3, is a minimax fit of Φ: error 3e-9, where the rounding of fp32 brings 6e-8.
inline Normal normal(Floats x) {
    const Floats distance = magnitude(x);
    const Floats y = distance < 12.0f ? distance : 12.0f;
    const Floats bell = distance < 12.0f ? exp2(-0.72134752f * y * y) : Floats{};  // Φ(-12) < 1e-32, x has no bound
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

// to (columns, kTile) = from (rows, columns)ᵀ, with zeros past `rows` up to the next multiple of kWidth.
template <class T>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
    for (int64_t i = 0; i < rows; i += kWidth) {
        for (int64_t j = 0; j < columns; j += kWidth) {
            Floats square[kWidth];
            for (int64_t row = 0; row < kWidth; ++row) {
                square[row] = i + row < rows ? load_most(from + (i + row) * stride + j, columns - j) : Floats{};
            }
            transpose(square, AllLanes());
            for (int64_t column = 0; column < kWidth && j + column < columns; ++column) {
                store(to + (j + column) * kTile + i, square[column]);
            }
        }
    }
}

// Asks for rows that are about to be read in an order that the machine does not foresee.
template <class T>
[[gnu::always_inline]] inline void prefetch(const T* from, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) prefetch_bytes<0, 3>(from + i * stride, columns * int64_t{sizeof(T)});
}

// A matrix whose element (i, k) is at[i * row + k * step].
struct Left {
    const float* at;
    int64_t row, step;
};

// What `multiply` does with kHeight rows and kVectors vectors of columns, or with one vector of `columns` < kWidth.
template <int kHeight, int kVectors, bool kWhole, class R>
inline void multiply_block(Left left, const R* right, int64_t right_stride, int64_t inner, float* out,
                           int64_t out_stride, int64_t columns, bool add) {
    Floats sums[kHeight][kVectors];
    for (int i = 0; i < kHeight; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = Floats{};
    }
    for (int64_t k = 0; k < inner; ++k) {
        for (int v = 0; v < kVectors; ++v) {
            const R* from = right + k * right_stride + v * kWidth;
            const Floats values = kWhole ? load(from) : load_some(from, columns);
            for (int i = 0; i < kHeight; ++i) sums[i][v] += left.at[i * left.row + k * left.step] * values;
        }
    }
    for (int i = 0; i < kHeight; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            float* to = out + i * out_stride + v * kWidth;
            if (add) sums[i][v] += kWhole ? load(to) : load_some(to, columns);
            kWhole ? store(to, sums[i][v]) : store_some(to, sums[i][v], columns);
        }
    }
}

template <int kVectors, bool kWhole, class R>
void multiply_columns(Left left, int64_t rows, const R* right, int64_t right_stride, int64_t inner, float* out,
                      int64_t out_stride, int64_t columns, bool add) {
    constexpr int kHeight = 4;
    for (; rows >= kHeight; rows -= kHeight) {
        multiply_block<kHeight, kVectors, kWhole>(left, right, right_stride, inner, out, out_stride, columns, add);
        left.at += kHeight * left.row;
        out += kHeight * out_stride;
    }
    for (; rows > 0; --rows) {
        multiply_block<1, kVectors, kWhole>(left, right, right_stride, inner, out, out_stride, columns, add);
        left.at += left.row;
        out += out_stride;
    }
}

// Vectors of columns taken together: with four rows, as many sums as the registers hold.
constexpr int kTogether = kWidth == 16 ? 4 : 2;

// out (rows, columns) = left (rows, inner) right (inner, columns), or += where `add`. Long sums are added up in runs
// of kTile terms, which keeps their rounding errors small.
template <class R>
void multiply(Left left, int64_t rows, const R* right, int64_t right_stride, int64_t inner, float* out,
              int64_t out_stride, int64_t columns, bool add) {
    do {
        const int64_t run = smaller(kTile, inner);
        int64_t j = 0;
        for (; j + kTogether * kWidth <= columns; j += kTogether * kWidth) {
            multiply_columns<kTogether, true>(left, rows, right + j, right_stride, run, out + j, out_stride, 0, add);
        }
        for (; j + kWidth <= columns; j += kWidth) {
            multiply_columns<1, true>(left, rows, right + j, right_stride, run, out + j, out_stride, 0, add);
        }
        if (j < columns) {
            multiply_columns<1, false>(left, rows, right + j, right_stride, run, out + j, out_stride, columns - j, add);
        }
        left.at += run * left.step;
        right += run * right_stride;
        inner -= run;
        add = true;
    } while (inner > 0);
}

// out (columns,) = the sum of the rows of `from`: their product with ones.
void sum_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, float* out) {
    const float one = 1.0f;
    multiply({&one, 0, 0}, 1, from, stride, rows, out, columns, columns, false);
}

// Lane l is the dot product of `row` and right[l], for kWidth rows of `right`; `inner` is a multiple of kWidth.
template <class T>
inline Floats dots(const float* row, const T* right, int64_t right_stride, int64_t inner) {
    Floats products[kWidth] = {};
    for (int64_t k = 0; k < inner; k += kWidth) {
        const Floats values = load(row + k);
#pragma GCC unroll 16
        for (int lane = 0; lane < kWidth; ++lane) products[lane] += values * load(right + lane * right_stride + k);
    }
    transpose(products, AllLanes());
    Floats sum = products[0];
    for (int lane = 1; lane < kWidth; ++lane) sum += products[lane];
    return sum;
}

// out (rows, count) += left (rows, inner) rightᵀ, with right (count, inner), both at most kTile in `count`.
// Few rows read `right` as it is; many are worth a transposed copy, `panel` (inner, kTile).
template <class T>
void add_product(const float* left, int64_t left_stride, int64_t rows, const T* right, int64_t right_stride,
                 int64_t count, int64_t inner, float* panel, float* out, int64_t out_stride) {
    constexpr int64_t kMany = 8;
    prefetch(right, right_stride, count, inner);
    if (rows < kMany && count % kWidth == 0 && inner % kWidth == 0) {
        for (int64_t j = 0; j < count; j += kWidth) {
            for (int64_t i = 0; i < rows; ++i) {
                float* at = out + i * out_stride + j;
                const T* block = right + j * right_stride;
                store(at, load(at) + dots(left + i * left_stride, block, right_stride, inner));
            }
        }
    } else {
        transpose(right, right_stride, count, inner, panel);
        multiply({left, left_stride, 1}, rows, panel, kTile, inner, out, out_stride, count, true);
    }
}

// out (rows, columns) = from (rows, columns); a stride of 0 repeats one row.
template <class T, class O>
void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t columns, O* out, int64_t out_stride) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; j += kWidth) {
            store_most(out + i * out_stride + j, load_most(from + i * stride + j, columns - j), columns - j);
        }
    }
}

// One projection's parameters.
template <class T>
struct Projection {
    Projection(const GateBank& bank, int64_t m)
        : d_u(bank.d_u),
          stride(padded_embedding(bank.d_u)),
          hidden(bank.hidden),
          outputs(bank.outputs),
          ln_weight(static_cast<const T*>(bank.ln_weight) + m * d_u),
          ln_bias(static_cast<const T*>(bank.ln_bias) + m * d_u),
          w1(static_cast<const T*>(bank.w1) + m * hidden * d_u),
          b1(static_cast<const T*>(bank.b1) + m * hidden),
          w2(static_cast<const T*>(bank.w2) + m * outputs * hidden) {}

    // x = x̂ ∘ v + c, with zeros past d_u.
    void affine(const float* normed, int64_t rows, float* x) const {
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t d = 0; d < d_u; d += kWidth) {
                const Floats weight = load_most(ln_weight + d, d_u - d), bias = load_most(ln_bias + d, d_u - d);
                store(x + b * stride + d, load(normed + b * stride + d) * weight + bias);
            }
        }
    }

    // a (rows, kTile) = x W1ᵀ + b1 for the hidden units [first, first + count).
    void hidden_layer(const float* x, int64_t rows, int64_t first, int64_t count, float* panel, float* a) const {
        copy_rows(b1 + first, 0, rows, count, a, kTile);
        add_product(x, stride, rows, w1 + first * d_u, d_u, count, d_u, panel, a, kTile);
    }

    const int64_t d_u, stride, hidden, outputs;
    const T *ln_weight, *ln_bias, *w1, *b1, *w2;
};

template <class T>
void forward(const GateBank& bank, const T* b2, float* flat, const float* normed, int64_t m, int64_t first,
             int64_t last, float* scratch) {
    const Projection<T> projection(bank, m);
    const int64_t rows = last - first, n = bank.outputs;
    float *x = scratch, *g = x + kTile * projection.stride, *panel = g + kTile * kTile;
    flat += (m * bank.instances + first) * n;
    projection.affine(normed + first * projection.stride, rows, x);
    copy_rows(b2 + m * n, 0, rows, n, flat, n);
    for (int64_t h = 0; h < bank.hidden; h += kTile) {
        const int64_t count = smaller(kTile, bank.hidden - h);
        projection.hidden_layer(x, rows, h, count, panel, g);
        for (int64_t b = 0; b < rows; ++b) {
            for (float* at = g + b * kTile; at < g + b * kTile + count; at += kWidth) {
                const Floats a = load(at);
                store(at, a * normal(a).cdf);
            }
        }
        for (int64_t j = 0; j < n; j += kTile) {
            const T* w2 = projection.w2 + j * bank.hidden + h;
            add_product(g, kTile, rows, w2, bank.hidden, smaller(kTile, n - j), count, panel, flat + j, n);
        }
    }
}

// Columns [d, d + kVectors * kWidth) of dW1 = outer ∘ v + db1 ⊗ c, dv += Σ W1 ∘ outer and dc += db1 W1, all for
// the hidden units [first, first + count); outer = daᵀ x̂.
template <int kVectors, class T>
inline void input_gradient(const Projection<T>& projection, const float* outer, const float* db1, int64_t first,
                           int64_t count, int64_t d, T* dw1, float* dln_weight, float* dln_bias) {
    const int64_t d_u = projection.d_u;
    Floats weight[kVectors], bias[kVectors], dweight[kVectors], dbias[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        const int64_t at = d + v * kWidth;
        weight[v] = load_most(projection.ln_weight + at, d_u - at);
        bias[v] = load_most(projection.ln_bias + at, d_u - at);
        dweight[v] = dbias[v] = Floats{};
    }
    for (int64_t h = 0; h < count; ++h) {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = d + v * kWidth, at = (first + h) * d_u + column;
            const Floats w = load_most(projection.w1 + at, d_u - column);
            const Floats product = load(outer + h * projection.stride + column);
            store_most(dw1 + at, product * weight[v] + db1[h] * bias[v], d_u - column);
            dweight[v] += w * product;
            dbias[v] += w * db1[h];
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        const int64_t at = d + v * kWidth;
        store(dln_weight + at, load(dln_weight + at) + dweight[v]);
        store(dln_bias + at, load(dln_bias + at) + dbias[v]);
    }
}

template <class T>
void backward(const GateBank& bank, const GateBankGradients& gradients, const float* normed, float* dnormed, int64_t m,
              float* scratch) {
    const Projection<T> projection(bank, m);
    const int64_t rows = bank.instances, d_u = bank.d_u, stride = projection.stride, n = bank.outputs;
    float *x = scratch, *dx = x + rows * stride, *g = dx + rows * stride, *da = g + rows * kTile;
    float *panel = da + rows * kTile, *sums = panel + panel_size(bank);
    float *dln_weight = sums + larger(kTile, n), *dln_bias = dln_weight + stride;
    const float* dflat = gradients.dflat + m * rows * n;
    T* dw1 = static_cast<T*>(gradients.dw1) + m * bank.hidden * d_u;
    T* dw2 = static_cast<T*>(gradients.dw2) + m * n * bank.hidden;

    sum_rows(dflat, n, rows, n, sums);
    copy_rows(sums, n, 1, n, static_cast<T*>(gradients.db2) + m * n, n);
    projection.affine(normed, rows, x);
    for (int64_t d = 0; d < 2 * stride; ++d) dln_weight[d] = 0.0f;
    for (int64_t h = 0; h < bank.hidden; h += kTile) {
        const int64_t count = smaller(kTile, bank.hidden - h);
        projection.hidden_layer(x, rows, h, count, panel, g);
        for (int64_t j = 0; j < n; j += kTile) {
            const T* w2 = projection.w2 + j * bank.hidden + h;
            const int64_t inner = smaller(kTile, n - j);
            prefetch(w2, bank.hidden, inner, count);
            multiply({dflat + j, n, 1}, rows, w2, bank.hidden, inner, da, kTile, count, j > 0);
        }
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t at = b * kTile; at < b * kTile + count; at += kWidth) {
                const Floats a = load(g + at);
                const Normal gauss = normal(a);
                store(g + at, a * gauss.cdf);
                store(da + at, load(da + at) * (gauss.cdf + a * gauss.density));
            }
        }
        for (int64_t j = 0; j < n; j += kTile) {
            const int64_t height = smaller(kTile, n - j);
            multiply({dflat + j, 1, n}, height, g, kTile, rows, panel, kTile, count, false);
            copy_rows(panel, kTile, height, count, dw2 + j * bank.hidden + h, bank.hidden);
        }

        sum_rows(da, kTile, rows, count, sums);
        copy_rows(sums, count, 1, count, static_cast<T*>(gradients.db1) + m * bank.hidden + h, count);
        multiply({da, 1, kTile}, count, normed, stride, rows, panel, stride, d_u, false);
        int64_t d = 0;
        for (; d + kTogether * kWidth <= d_u; d += kTogether * kWidth) {
            input_gradient<kTogether>(projection, panel, sums, h, count, d, dw1, dln_weight, dln_bias);
        }
        for (; d < d_u; d += kWidth) {
            input_gradient<1>(projection, panel, sums, h, count, d, dw1, dln_weight, dln_bias);
        }

        if (dnormed == nullptr) continue;
        multiply({da, kTile, 1}, rows, projection.w1 + h * d_u, d_u, count, dx, stride, d_u, false);
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t j = 0; j < d_u; j += kWidth) {
                const int64_t at = b * stride + j;
                const Floats weight = load_most(projection.ln_weight + j, d_u - j);
                store(dnormed + at, load(dnormed + at) + load(dx + at) * weight);
            }
        }
    }
    copy_rows(dln_weight, d_u, 1, d_u, static_cast<T*>(gradients.dln_weight) + m * d_u, d_u);
    copy_rows(dln_bias, d_u, 1, d_u, static_cast<T*>(gradients.dln_bias) + m * d_u, d_u);
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
