#include "cflora.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace rellax {
namespace {

// Multiplications for which a further thread is worth its start.
constexpr int64_t kThreadWork = int64_t{1} << 20;

std::vector<Tile> tiles_of(const int64_t* offsets, int64_t instances) {
    std::vector<Tile> tiles;
    for (int64_t instance = 0; instance < instances; ++instance) {
        const int64_t end = offsets[instance + 1];
        for (int64_t first = offsets[instance]; first < end; first += kTileTokens) {
            tiles.push_back({static_cast<int64_t>(tiles.size()), instance, first, std::min(first + kTileTokens, end)});
        }
    }
    return tiles;
}

// One block of columns of one factor, whose first component is number `first` of the packed ones.
template <class Element>
void pack_block(const CfloraFactor& factor, int64_t components, int64_t first, int64_t d, int64_t all, bool expanding,
                int64_t block, Element* out) {
    constexpr int64_t kGroup = 4 / sizeof(Element);
    const int64_t blocks = padded_columns(d) / kBlock, begin = block * kBlock, width = std::min(kBlock, d - begin);
    for (int64_t i = 0; i < components; ++i) {
        const int64_t c = first + i, step = expanding ? kGroup : 1;
        const int64_t row = expanding ? block * padded_components(all) + c / kGroup * kGroup
                                      : (c / kComponents * blocks + block) * kComponents + c % kComponents;
        const Element* const from = static_cast<const Element*>(factor.at) + i * factor.component;
        Element* const to = out + row * kBlock + (expanding ? c % kGroup : 0);
        for (int64_t j = 0; j < width; ++j) to[j * step] = from[(begin + j) * factor.column];
    }
}

// The components of all factors, r each, in one of the two forms.
std::vector<uint32_t> pack(Dtype dtype, const std::vector<CfloraFactor>& factors, int64_t r, int64_t d, bool expanding,
                           int threads) {
    constexpr int64_t kMoves = 16;  // multiplications that take as long as to move an element
    const int64_t all = static_cast<int64_t>(factors.size()) * r, size = padded_components(all) * padded_columns(d);
    std::vector<uint32_t> packed(dtype == Dtype::float32 ? size : size / 2);
    parallel_for(padded_columns(d) / kBlock, threads_for(kMoves * size, kThreadWork, threads), [&](int64_t block) {
        for (size_t i = 0; i < factors.size(); ++i) {
            const int64_t first = static_cast<int64_t>(i) * r;
            if (dtype == Dtype::float32) {
                pack_block(factors[i], r, first, d, all, expanding, block, packed.data());
            } else {
                pack_block(factors[i], r, first, d, all, expanding, block, reinterpret_cast<uint16_t*>(packed.data()));
            }
        }
    });
    return packed;
}

// Layers that kernels can read: with packed factors.
struct Packed {
    std::vector<CfloraLayer> layers;
    std::vector<uint32_t> a;
    std::vector<std::vector<uint32_t>> b;
    Cflora task;

    Packed(const Cflora& plain, bool forward, int threads)
        : layers(plain.layer, plain.layer + plain.layers), task(plain) {
        std::vector<CfloraFactor> factors;
        for (CfloraLayer& layer : layers) {
            factors.push_back(layer.a);
            b.push_back(pack(task.dtype, {layer.b}, task.r, layer.d, forward, threads));
            layer.packed_b = b.back().data();
        }
        a = pack(task.dtype, factors, task.r, task.d_in, !forward, threads);
        task.packed_a = a.data();
        task.layer = layers.data();
    }
};

void run(CfloraKernel* kernel, const Cflora& task, const std::vector<Tile>& tiles, int threads) {
    const int64_t tokens = tiles.empty() ? 0 : tiles.back().last;
    int64_t columns = task.layers * task.d_in, widest = task.d_in;
    for (int64_t i = 0; i < task.layers; ++i) {
        columns += task.layer[i].d;
        widest = std::max(widest, task.layer[i].d);
    }
    const int64_t size = cflora_scratch(widest, task.layers * task.r), work = tokens * task.r * columns;
    parallel_for(static_cast<int64_t>(tiles.size()), threads_for(work, kThreadWork, threads), [&](int64_t index) {
        const Scratch scratch(size);
        kernel(task, tiles[index], scratch.data());
    });
}

}  // namespace

void cflora_forward(const Cflora& task, const int64_t* offsets, int64_t instances, int threads) {
    const Packed packed(task, true, threads);
    run(level().cflora_forward, packed.task, tiles_of(offsets, instances), threads);
}

void cflora_backward(const Cflora& task, const int64_t* offsets, int64_t instances, float* const* dgates, int threads) {
    const std::vector<Tile> tiles = tiles_of(offsets, instances);
    const int64_t square = task.r * task.r, share = static_cast<int64_t>(tiles.size()) * square;
    std::vector<float> shares(dgates == nullptr ? 0 : task.layers * share);
    Packed packed(task, false, threads);
    for (int64_t i = 0; dgates != nullptr && i < task.layers; ++i) packed.layers[i].dgate = shares.data() + i * share;
    run(level().cflora_backward, packed.task, tiles, threads);
    for (int64_t i = 0; dgates != nullptr && i < task.layers; ++i) {
        std::fill_n(dgates[i], instances * square, 0.0f);
        for (const Tile& tile : tiles) {
            const float* const from = shares.data() + i * share + tile.index * square;
            float* const to = dgates[i] + tile.instance * square;
            for (int64_t entry = 0; entry < square; ++entry) to[entry] += from[entry];
        }
    }
}

void cflora_outer(const CfloraOuter& task, int threads) {
    CfloraOuterKernel* const kernel = level().cflora_outer;
    const int64_t pieces = round_up(task.d, kTileColumns) / kTileColumns;
    parallel_for(pieces, threads_for(task.tokens * task.components * task.d, kThreadWork, threads), [&](int64_t piece) {
        std::vector<float> scratch(kOuterScratch);
        kernel(task, piece * kTileColumns, std::min((piece + 1) * kTileColumns, task.d), scratch.data());
    });
}

}  // namespace rellax
