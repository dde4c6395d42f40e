// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "cflora.h"

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

constexpr int64_t kShrinkColumns = 2048;  // of kTogether rows: half of a first cache of 32 KiB

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
        store(out, drop(dropout, hash, j, load_most(row + j, last - j)));
    }
}

// The `count` rows from token `first` on as operands read them: in whole blocks, without what is dropped. Rows that
// need no change stay where they are, the others are copied to `staging`.
template <class T>
void stage(const T* rows, int64_t stride, int64_t d, const Dropout& dropout, int64_t first, int64_t count, T* staging,
           const T** staged) {
    const bool whole = d % kBlock == 0;
    for (int64_t i = 0; i < count; ++i) {
        const T* row = rows + (first + i) * stride;
        staged[i] = row;
        if (whole && dropout.column == nullptr) continue;
        T* copy = staging + i * padded_columns(d);
        staged[i] = copy;
        const uint32_t hash = hash_row(dropout, first + i);
        for (int64_t j = 0; j < padded_columns(d); j += kWidth) {
            store(copy + j, drop(dropout, hash, j, load_most(row + j, d - j)));
        }
    }
}

// The dot products of kHeight rows and one block of components, over columns [first, last): whole blocks of columns.
template <int kHeight, class T>
inline void dot(const T* const* rows, const T* components, int64_t first, int64_t last, Four (&dots)[kHeight]) {
    constexpr int kStep = kWidth * Operand<T>::kGroup;
    Floats products[kHeight][kComponents] = {};
    for (int64_t block = first; block < last; block += kBlock) {
        for (int j = 0; j < kBlock; j += kStep) {
            for (int c = 0; c < kComponents; ++c) {
                const auto component = load_operand(components + block * kComponents + c * kBlock + j);
                for (int i = 0; i < kHeight; ++i) {
                    products[i][c] = multiply_add(load_operand(rows[i] + block + j), component, products[i][c]);
                }
            }
        }
    }
    for (int i = 0; i < kHeight; ++i) dots[i] = sums(products[i]);
}

// out (count, components) = factor · drop(rows) matrixᵀ for the tile's tokens. kTogether rows, of kShrinkColumns,
// stay in the first cache while the components pass by.
template <class T>
void shrink(const T* rows, int64_t row_stride, int64_t d, const T* matrix, int64_t components, const Dropout& dropout,
            const Tile& tile, float factor, T* staging, float* out, int64_t out_stride) {
    const int64_t count = tile.last - tile.first, columns = padded_columns(d);
    const T* staged[kTileTokens];
    stage(rows, row_stride, d, dropout, tile.first, count, staging, staged);
    for (int64_t first = 0; first == 0 || first < columns; first += kShrinkColumns) {  // once where d is 0
        const int64_t last = smaller(first + kShrinkColumns, columns);
        for (int64_t t = 0; t < count; t += kTogether) {
            const int64_t height = smaller(count - t, kTogether);
            for (int64_t component = 0; component < components; component += kComponents) {
                const T* part = matrix + component * columns;
                const int64_t width = smaller(components - component, kComponents);
                Four dots[kTogether];
                if (height == kTogether) {
                    dot<kTogether>(staged + t, part, first, last, dots);
                } else {
                    for (int64_t i = 0; i < height; ++i) {
                        dot<1>(staged + t + i, part, first, last, reinterpret_cast<Four(&)[1]>(dots[i]));
                    }
                }
                for (int64_t i = 0; i < height; ++i) {
                    for (int64_t c = 0; c < width; ++c) {
                        float& at = out[(t + i) * out_stride + component + c];
                        at = (first == 0 ? 0.0f : at) + factor * dots[i][c];
                    }
                }
            }
        }
    }
}

// What an expansion is added to: rows, or null, nothing. The sum begins with it: all rows of a block are then read
// before one is written, and no read waits for a write of the row before, whose address is often the same in its
// lowest bits.
template <class T>
struct AddTo {
    const T* rows;
    int64_t stride;

    // `left` columns exist from `column` on.
    Floats begin(int64_t token, int64_t column, int64_t left) const {
        return rows == nullptr ? Floats{} : load_most(rows + token * stride + column, left);
    }
    Floats finish(int64_t, int64_t, int64_t, Floats sum) const { return sum; }
};

// The same where the expansion passes through dropout first.
template <class T>
struct DropThenAdd {
    const Dropout& dropout;
    const AddTo<T> to;

    Floats begin(int64_t, int64_t, int64_t) const { return Floats{}; }
    Floats finish(int64_t token, int64_t column, int64_t left, Floats sum) const {
        return drop(dropout, hash_row(dropout, token), column, sum) + to.begin(token, column, left);
    }
};

// One block of columns of kHeight rows. `left` columns of it exist; `to` takes a whole block all the same.
template <int kHeight, class T, class Ends>
inline void expand_block(const T* z, const T* block, int64_t components, const Ends& ends, int64_t token,
                         int64_t column, int64_t left, T* const* to) {
    constexpr int kGroup = Operand<T>::kGroup, kVectors = 2;
    const int64_t padded = padded_components(components);
    for (int j = 0; j < kBlock; j += kVectors * kWidth) {
        Floats sums[kHeight][kVectors];
        for (int i = 0; i < kHeight; ++i) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t place = j + v * kWidth;
                sums[i][v] = ends.begin(token + i, column + place, left - place);
            }
        }
        for (int64_t c = 0; c < padded; c += kGroup) {
            for (int v = 0; v < kVectors; ++v) {
                const auto component = load_operand(block + c * kBlock + (j + v * kWidth) * kGroup);
                for (int i = 0; i < kHeight; ++i) {
                    const auto weight = Operand<T>::broadcast(z + i * padded + c);
                    sums[i][v] = multiply_add(weight, component, sums[i][v]);
                }
            }
        }
        for (int i = 0; i < kHeight; ++i) {
            for (int v = 0; v < kVectors; ++v) {
                const int64_t place = j + v * kWidth;
                store(to[i] + place, ends.finish(token + i, column + place, left - place, sums[i][v]));
            }
        }
    }
}

// Asks for a block that is about to be read and written.
template <class T>
inline void prefetch_block(const T* block) {
    constexpr int kLine = 64 / sizeof(T);
    for (int j = 0; j < kBlock; j += kLine) __builtin_prefetch(block + j, 1);
}

// kHeight rows from `token` on: rows = ends(z matrix). The rows that follow are asked for on the way.
template <int kHeight, class T, class Ends>
void expand_rows(T* rows, int64_t stride, int64_t d, const T* matrix, int64_t components, const T* z, const Ends& ends,
                 int64_t token) {
    const int64_t padded = padded_components(components);
    T* to[kHeight];
    for (int i = 0; i < kHeight; ++i) to[i] = rows + (token + i) * stride;
    int64_t j = 0;
    for (; j + kBlock <= d; j += kBlock) {
        expand_block<kHeight>(z, matrix + j * padded, components, ends, token, j, kBlock, to);
        for (int i = 0; i < kHeight; ++i) {
            prefetch_block(to[i] + kHeight * stride);
            to[i] += kBlock;
        }
    }
    if (j == d) return;
    T last[kHeight][kBlock];
    T* lasts[kHeight];
    for (int i = 0; i < kHeight; ++i) lasts[i] = last[i];
    expand_block<kHeight>(z, matrix + j * padded, components, ends, token, j, d - j, lasts);
    for (int i = 0; i < kHeight; ++i) __builtin_memcpy(to[i], last[i], (d - j) * sizeof(T));
}

// rows = ends(z matrix) for the tile's tokens; z (count, components) is narrowed to the rows' dtype first.
template <class T, class Ends>
void expand(T* rows, int64_t stride, int64_t d, const T* matrix, int64_t components, const float* z, const Ends& ends,
            const Tile& tile, T* narrow) {
    const int64_t count = tile.last - tile.first, padded = padded_components(components);
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t c = 0; c < padded; c += kWidth) {
            store_most(narrow + t * padded + c, load_most(z + t * components + c, components - c), padded - c);
        }
    }
    int64_t t = 0;
    for (; t + kTogether <= count; t += kTogether) {
        expand_rows<kTogether>(rows, stride, d, matrix, components, narrow + t * padded, ends, tile.first + t);
    }
    for (; t < count; ++t) {
        expand_rows<1>(rows, stride, d, matrix, components, narrow + t * padded, ends, tile.first + t);
    }
}

// out = factor · rows G, or · rows Gᵀ, for rows (count, r); a null gate is the identity.
void apply_gate(const float* rows, int64_t row_stride, int64_t count, const float* gate, bool transposed, int64_t r,
                float factor, float* out, int64_t out_stride) {
    for (int64_t t = 0; t < count; ++t, rows += row_stride, out += out_stride) {
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
void multiply_transposed(const float* left, int64_t left_stride, const float* right, int64_t count, int64_t r,
                         float* out) {
    for (int64_t entry = 0; entry < r * r; ++entry) out[entry] = 0.0f;
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t i = 0; i < r; ++i) {
            for (int64_t j = 0; j < r; ++j) out[i * r + j] += left[t * left_stride + i] * right[t * r + j];
        }
    }
}

const float* gate_of(const CfloraLayer& layer, const Tile& tile, int64_t r) {
    return layer.gate == nullptr ? nullptr : layer.gate + tile.instance * r * r;
}

int64_t widest(const Cflora& task) {
    int64_t d = task.d_in;
    for (int64_t i = 0; i < task.layers; ++i) d = task.layer[i].d > d ? task.layer[i].d : d;
    return d;
}

// The scratch of one tile: rows staged for shrinking, then blocks of a tile's numbers.
template <class T>
struct Scratch {
    T* staging;
    float *small, *wide;
    T* narrow;

    Scratch(const Cflora& task, float* memory) {
        const int64_t block = kTileTokens * padded_components(task.layers * task.r);
        staging = reinterpret_cast<T*>(memory);
        small = memory + kTileTokens * padded_columns(widest(task));
        wide = small + block;
        narrow = reinterpret_cast<T*>(wide + block);
    }
};

template <class T>
void forward(const Cflora& task, const Tile& tile, float* memory) {
    const Scratch<T> scratch(task, memory);
    const int64_t r = task.r, components = task.layers * r, count = tile.last - tile.first;
    float* const h = task.h + tile.first * components;
    shrink(static_cast<const T*>(task.x), task.x_stride, task.d_in, static_cast<const T*>(task.packed_a), components,
           task.dropout, tile, task.dropout.factor, scratch.staging, h, components);
    for (int64_t i = 0; i < task.layers; ++i) {
        const CfloraLayer& layer = task.layer[i];
        apply_gate(h + i * r, components, count, gate_of(layer, tile, r), false, r, task.scale, scratch.small, r);
        const AddTo<T> base{static_cast<const T*>(layer.base), layer.base_stride};
        expand(static_cast<T*>(layer.rows), layer.stride, layer.d, static_cast<const T*>(layer.packed_b), r,
               scratch.small, base, tile, scratch.narrow);
    }
}

template <class T>
void backward(const Cflora& task, const Tile& tile, float* memory) {
    const Scratch<T> scratch(task, memory);
    const int64_t r = task.r, components = task.layers * r, count = tile.last - tile.first;
    const float* const h = task.h + tile.first * components;
    float* const dh = task.dh == nullptr ? scratch.wide : task.dh + tile.first * components;
    float* const dz = scratch.small;
    for (int64_t i = 0; i < task.layers; ++i) {
        const CfloraLayer& layer = task.layer[i];
        const float* const gate = gate_of(layer, tile, r);
        shrink(static_cast<const T*>(layer.rows), layer.stride, layer.d, static_cast<const T*>(layer.packed_b), r, kKeepAll,
               tile, task.scale, scratch.staging, dz, r);
        if (layer.dgate != nullptr) {
            multiply_transposed(h + i * r, components, dz, count, r, layer.dgate + tile.index * r * r);
        }
        if (task.z != nullptr) {
            float* const z = task.z + tile.first * components + i * r;
            apply_gate(h + i * r, components, count, gate, false, r, task.scale, z, components);
        }
        apply_gate(dz, r, count, gate, true, r, task.dropout.factor, dh + i * r, components);
    }
    if (task.x != nullptr) {
        T* const dx = static_cast<T*>(task.x);
        const T* const a = static_cast<const T*>(task.packed_a);
        const AddTo<T> base{task.accumulate ? dx : nullptr, task.x_stride};
        if (task.dropout.column == nullptr) {
            expand(dx, task.x_stride, task.d_in, a, components, dh, base, tile, scratch.narrow);
        } else {
            const DropThenAdd<T> ends{task.dropout, base};
            expand(dx, task.x_stride, task.d_in, a, components, dh, ends, tile, scratch.narrow);
        }
    }
}

template <class T>
void outer(const CfloraOuter& task, int64_t first, int64_t last, float* wide) {
    constexpr int kVectors = 2;
    const int64_t stride = padded_columns(task.d);
    const T* right = static_cast<const T*>(task.right);
    for (int64_t token = 0; token < task.tokens; token += kTileTokens) {
        const int64_t count = smaller(task.tokens - token, kTileTokens);
        for (int64_t t = 0; t < count; ++t) {
            const T* row = right + (token + t) * task.right_stride;
            widen(row, token + t, first, last, task.dropout, wide + t * kTileColumns);
        }
        for (int64_t component = 0; component < task.components; component += kComponents) {
            const int64_t height = smaller(task.components - component, kComponents);
            for (int64_t j = first; j < last; j += kVectors * kWidth) {
                float* out = task.out + component * stride + j;
                Floats sums[kComponents][kVectors] = {};
                for (int64_t t = 0; t < count; ++t) {
                    const float* left = task.left + (token + t) * task.left_stride + component;
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

void cflora_forward(const Cflora& task, const Tile& tile, float* scratch) {
    task.dtype == Dtype::float32 ? forward<float>(task, tile, scratch) : forward<BFloat16>(task, tile, scratch);
}

void cflora_backward(const Cflora& task, const Tile& tile, float* scratch) {
    task.dtype == Dtype::float32 ? backward<float>(task, tile, scratch) : backward<BFloat16>(task, tile, scratch);
}

void cflora_outer(const CfloraOuter& task, int64_t first, int64_t last, float* scratch) {
    task.dtype == Dtype::float32 ? outer<float>(task, first, last, scratch)
                                 : outer<BFloat16>(task, first, last, scratch);
}

}  // namespace rellax::RELLAX_LEVEL
