// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "cflora.h"

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

constexpr Dropout kKeepAll = {nullptr, 0, 0, 1.0f};

template <class Word>
inline Word mix(Word h) {
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}

inline uint32_t hash_row(const Dropout& dropout, int64_t token) {
    return mix(mix(static_cast<uint32_t>(token)) ^ dropout.seed);
}

// All ones in the elements that are kept.
inline Words kept(const Dropout& dropout, uint32_t row, int64_t column) {
    Words hash;
    __builtin_memcpy(&hash, dropout.column + column, sizeof hash);
    return (Words)((Integers)mix(hash ^ row) >= dropout.threshold);
}

inline Floats drop(const Dropout& dropout, uint32_t row, int64_t column, Floats values) {
    return dropout.column == nullptr ? values : (Floats)((Words)values & kept(dropout, row, column));
}

// Columns [first, last) of one row, dropped and as floats; zeros up to the next multiple of the vector width.
template <class T>
void widen(const T* row, int64_t token, int64_t first, int64_t last, const Dropout& dropout, float* out) {
    const uint32_t hash = hash_row(dropout, token);
    for (int64_t j = first; j < last; j += kWidth, out += kWidth) {
        const Floats values = j + kWidth <= last ? load(row + j) : load_some(row + j, last - j);
        store(out, drop(dropout, hash, j, values));
    }
}

// dots (kHeight, kComponents) of `kHeight` rows of floats and kComponents rows of `down`.
template <int kHeight>
inline void dot(const float* rows, const float* down, int64_t d, int64_t stride, float (*dots)[kComponents]) {
    Floats sums[kHeight][kComponents] = {};
    for (int64_t j = 0; j < d; j += kWidth) {
        for (int c = 0; c < kComponents; ++c) {
            const Floats component = load(down + c * stride + j);
            for (int i = 0; i < kHeight; ++i) sums[i][c] += load(rows + i * stride + j) * component;
        }
    }
    for (int i = 0; i < kHeight; ++i) {
        for (int c = 0; c < kComponents; ++c) dots[i][c] = sum(sums[i][c]);
    }
}

// out (count, r) = factor · drop(from) downᵀ for the `count` tokens from `first` on.
template <class T>
void shrink(const CfloraUpdate& task, const Dropout& dropout, int64_t first, int64_t count, float factor,
            float* wide, float* out) {
    const int64_t r = task.r, d = task.d_from, stride = padded_columns(d);
    const T* from = static_cast<const T*>(task.from);
    for (int64_t t = 0; t < count; t += kTogether) {
        const int64_t height = count - t < kTogether ? count - t : kTogether;
        for (int64_t i = 0; i < height; ++i) {
            const int64_t token = first + t + i;
            widen(from + token * task.from_stride, token, 0, d, dropout, wide + i * stride);
        }
        for (int64_t component = 0; component < r; component += kComponents) {
            const float* down = task.down + component * stride;
            float dots[kTogether][kComponents];
            if (height == kTogether) {
                dot<kTogether>(wide, down, d, stride, dots);
            } else {
                for (int64_t i = 0; i < height; ++i) dot<1>(wide + i * stride, down, d, stride, dots + i);
            }
            for (int64_t i = 0; i < height; ++i) {
                for (int64_t c = 0; c < kComponents && component + c < r; ++c) {
                    out[(t + i) * r + component + c] = factor * dots[i][c];
                }
            }
        }
    }
}

// Columns [j, j + kVectors * kWidth) of kHeight rows: to += drop(z up). `count` columns of them exist.
template <int kHeight, int kVectors, class T>
inline void expand_block(const CfloraUpdate& task, const Dropout& dropout, int64_t token, const float* z, int64_t j,
                         int64_t count) {
    const int64_t r = task.r, stride = padded_columns(task.d_to);
    Floats sums[kHeight][kVectors] = {};
    for (int64_t c = 0; c < r; ++c) {
        for (int v = 0; v < kVectors; ++v) {
            const Floats component = load(task.up + c * stride + j + v * kWidth);
            for (int i = 0; i < kHeight; ++i) sums[i][v] += z[i * r + c] * component;
        }
    }
    for (int i = 0; i < kHeight; ++i) {
        const uint32_t hash = hash_row(dropout, token + i);
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = j + v * kWidth, left = count - v * kWidth;
            if (left <= 0) break;
            T* to = static_cast<T*>(task.to) + (token + i) * task.d_to + column;
            const Floats added = drop(dropout, hash, column, sums[i][v]);
            if (left >= kWidth) {
                store(to, load(to) + added);
            } else {
                store_some(to, load_some(to, left) + added, left);
            }
        }
    }
}

// to += drop(z up) for the `count` tokens from `first` on.
template <class T>
void expand(const CfloraUpdate& task, const Dropout& dropout, int64_t first, int64_t count, const float* z) {
    constexpr int kVectors = 2;  // two sums of a row side by side: neither waits for itself
    const int64_t r = task.r, d = task.d_to;
    int64_t t = 0;
    for (; t + kTogether <= count; t += kTogether) {
        for (int64_t j = 0; j < d; j += kVectors * kWidth) {
            expand_block<kTogether, kVectors, T>(task, dropout, first + t, z + t * r, j, d - j);
        }
    }
    for (; t < count; ++t) {
        for (int64_t j = 0; j < d; j += kVectors * kWidth) {
            expand_block<1, kVectors, T>(task, dropout, first + t, z + t * r, j, d - j);
        }
    }
}

// out = factor · rows G, or · rows Gᵀ, for rows (count, r); a null gate is the identity.
void apply_gate(const float* rows, int64_t count, const float* gate, bool transposed, int64_t r, float factor,
                float* out) {
    for (int64_t t = 0; t < count; ++t, rows += r, out += r) {
        for (int64_t j = 0; j < r; ++j) out[j] = gate == nullptr ? factor * rows[j] : 0.0f;
        if (gate == nullptr) continue;
        for (int64_t i = 0; i < r; ++i) {
            if (transposed) {
                for (int64_t j = 0; j < r; ++j) out[i] += rows[j] * gate[i * r + j];
            } else {
                for (int64_t j = 0; j < r; ++j) out[j] += rows[i] * gate[i * r + j];
            }
        }
        for (int64_t j = 0; j < r; ++j) out[j] *= factor;
    }
}

// out (r, r) = left (count, r)ᵀ right (count, r).
void multiply_transposed(const float* left, const float* right, int64_t count, int64_t r, float* out) {
    for (int64_t entry = 0; entry < r * r; ++entry) out[entry] = 0.0f;
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = 0; i < r; ++i) {
            for (int64_t j = 0; j < r; ++j) out[i * r + j] += left[t * r + i] * right[t * r + j];
        }
    }
}

template <class T>
void forward(const CfloraUpdate& task, const Tile& tile, float* scratch) {
    const int64_t r = task.r, count = tile.last - tile.first;
    const float* gate = task.gate == nullptr ? nullptr : task.gate + tile.instance * r * r;
    float* h = task.h + tile.first * r;
    float* z = scratch + kTogether * padded_columns(task.d_from);
    shrink<T>(task, task.dropout, tile.first, count, task.dropout.factor, scratch, h);
    apply_gate(h, count, gate, false, r, task.scale, z);
    expand<T>(task, kKeepAll, tile.first, count, z);
}

template <class T>
void backward(const CfloraUpdate& task, const Tile& tile, float* scratch) {
    const int64_t r = task.r, count = tile.last - tile.first;
    const float* gate = task.gate == nullptr ? nullptr : task.gate + tile.instance * r * r;
    const float* h = task.h + tile.first * r;
    float* dz = scratch + kTogether * padded_columns(task.d_from);
    float* dh = task.dh == nullptr ? dz + kTileTokens * r : task.dh + tile.first * r;
    shrink<T>(task, kKeepAll, tile.first, count, task.scale, scratch, dz);
    if (task.dgate != nullptr) multiply_transposed(h, dz, count, r, task.dgate + tile.index * r * r);
    if (task.z != nullptr) apply_gate(h, count, gate, false, r, task.scale, task.z + tile.first * r);
    apply_gate(dz, count, gate, true, r, task.dropout.factor, dh);
    if (task.to != nullptr) expand<T>(task, task.dropout, tile.first, count, dh);
}

template <class T>
void outer(const CfloraOuter& task, int64_t first, int64_t last, float* wide) {
    constexpr int kVectors = 2;
    const int64_t r = task.r, stride = padded_columns(task.d);
    const T* right = static_cast<const T*>(task.right);
    for (int64_t token = 0; token < task.tokens; token += kTileTokens) {
        const int64_t count = task.tokens - token < kTileTokens ? task.tokens - token : kTileTokens;
        for (int64_t t = 0; t < count; ++t) {
            const T* row = right + (token + t) * task.right_stride;
            widen(row, token + t, first, last, task.dropout, wide + t * kTileColumns);
        }
        for (int64_t component = 0; component < r; component += kComponents) {
            const int64_t height = r - component < kComponents ? r - component : kComponents;
            for (int64_t j = first; j < last; j += kVectors * kWidth) {
                float* out = task.out + component * stride + j;
                Floats sums[kComponents][kVectors] = {};
                for (int64_t t = 0; t < count; ++t) {
                    const float* left = task.left + (token + t) * r + component;
                    for (int v = 0; v < kVectors; ++v) {
                        const Floats values = load(wide + t * kTileColumns + j - first + v * kWidth);
                        for (int64_t c = 0; c < height; ++c) sums[c][v] += left[c] * values;
                    }
                }
                for (int64_t c = 0; c < height; ++c) {
                    for (int v = 0; v < kVectors; ++v) {
                        float* at = out + c * stride + v * kWidth;
                        store(at, token == 0 ? sums[c][v] : load(at) + sums[c][v]);
                    }
                }
            }
        }
    }
}

}  // namespace

void cflora_forward(const CfloraUpdate& task, const Tile& tile, float* scratch) {
    task.dtype == Dtype::float32 ? forward<float>(task, tile, scratch) : forward<BFloat16>(task, tile, scratch);
}

void cflora_backward(const CfloraUpdate& task, const Tile& tile, float* scratch) {
    task.dtype == Dtype::float32 ? backward<float>(task, tile, scratch) : backward<BFloat16>(task, tile, scratch);
}

void cflora_outer(const CfloraOuter& task, int64_t first, int64_t last, float* scratch) {
    task.dtype == Dtype::float32 ? outer<float>(task, first, last, scratch)
                                 : outer<BFloat16>(task, first, last, scratch);
}

}  // namespace rellax::RELLAX_LEVEL
