#include "cflora.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace rellax {
namespace {

// Multiplications for which a further thread is worth its start.
constexpr int64_t kThreadWork = int64_t{1} << 20;

int threads_for(int64_t work, int threads) {
    return static_cast<int>(std::clamp<int64_t>(work / kThreadWork, 1, std::max(threads, 1)));
}

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

void run(CfloraKernel* kernel, const Cflora& task, const std::vector<Tile>& tiles, int threads) {
    const int64_t tokens = tiles.empty() ? 0 : tiles.back().last;
    int64_t columns = task.layers * task.d_in, widest = task.d_in;
    for (int64_t i = 0; i < task.layers; ++i) {
        columns += task.layer[i].d;
        widest = std::max(widest, task.layer[i].d);
    }
    const int64_t size = cflora_scratch(widest, task.layers * task.r);
    parallel_for(static_cast<int64_t>(tiles.size()), threads_for(tokens * task.r * columns, threads), [&](int64_t index) {
        thread_local std::vector<float> scratch;
        scratch.resize(size);
        kernel(task, tiles[index], scratch.data());
    });
}

}  // namespace

void cflora_forward(const Cflora& task, const int64_t* offsets, int64_t instances, int threads) {
    run(level().cflora_forward, task, tiles_of(offsets, instances), threads);
}

void cflora_backward(const Cflora& task, const int64_t* offsets, int64_t instances, float* const* dgates, int threads) {
    const std::vector<Tile> tiles = tiles_of(offsets, instances);
    const int64_t square = task.r * task.r, share = static_cast<int64_t>(tiles.size()) * square;
    std::vector<float> shares(dgates == nullptr ? 0 : task.layers * share);
    std::vector<CfloraLayer> layers(task.layer, task.layer + task.layers);
    for (int64_t i = 0; dgates != nullptr && i < task.layers; ++i) layers[i].dgate = shares.data() + i * share;
    Cflora with_shares = task;
    with_shares.layer = layers.data();
    run(level().cflora_backward, with_shares, tiles, threads);
    for (int64_t i = 0; dgates != nullptr && i < task.layers; ++i) {
        std::fill_n(dgates[i], instances * square, 0.0f);
        for (const Tile& tile : tiles) {
            const float* const from = layers[i].dgate + tile.index * square;
            float* const to = dgates[i] + tile.instance * square;
            for (int64_t entry = 0; entry < square; ++entry) to[entry] += from[entry];
        }
    }
}

void cflora_outer(const CfloraOuter& task, int threads) {
    CfloraOuterKernel* const kernel = level().cflora_outer;
    const int64_t pieces = round_up(task.d, kTileColumns) / kTileColumns;
    parallel_for(pieces, threads_for(task.tokens * task.components * task.d, threads), [&](int64_t piece) {
        std::vector<float> scratch(kOuterScratch);
        kernel(task, piece * kTileColumns, std::min((piece + 1) * kTileColumns, task.d), scratch.data());
    });
}

}  // namespace rellax
