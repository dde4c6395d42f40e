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

void run(CfloraUpdateKernel* kernel, const CfloraUpdate& task, const std::vector<Tile>& tiles, int threads) {
    const int64_t tokens = tiles.empty() ? 0 : tiles.back().last;
    const int64_t work = tokens * task.r * (task.d_from + task.d_to);
    parallel_for(static_cast<int64_t>(tiles.size()), threads_for(work, threads), [&](int64_t index) {
        thread_local std::vector<float> scratch;
        scratch.resize(update_scratch(task));
        kernel(task, tiles[index], scratch.data());
    });
}

}  // namespace

void cflora_forward(const CfloraUpdate& task, const int64_t* offsets, int64_t instances, int threads) {
    run(level().cflora_forward, task, tiles_of(offsets, instances), threads);
}

void cflora_backward(CfloraUpdate task, const int64_t* offsets, int64_t instances, float* dgate, int threads) {
    const std::vector<Tile> tiles = tiles_of(offsets, instances);
    const int64_t square = task.r * task.r;
    std::vector<float> shares(dgate == nullptr ? 0 : tiles.size() * square);
    task.dgate = dgate == nullptr ? nullptr : shares.data();
    run(level().cflora_backward, task, tiles, threads);
    if (dgate == nullptr) return;
    std::fill_n(dgate, instances * square, 0.0f);
    for (const Tile& tile : tiles) {
        for (int64_t entry = 0; entry < square; ++entry) {
            dgate[tile.instance * square + entry] += shares[tile.index * square + entry];
        }
    }
}

void cflora_outer(const CfloraOuter& task, int threads) {
    CfloraOuterKernel* const kernel = level().cflora_outer;
    const int64_t pieces = round_up(task.d, kTileColumns) / kTileColumns;
    parallel_for(pieces, threads_for(task.tokens * task.r * task.d, threads), [&](int64_t piece) {
        std::vector<float> scratch(kOuterScratch);
        kernel(task, piece * kTileColumns, std::min((piece + 1) * kTileColumns, task.d), scratch.data());
    });
}

}  // namespace rellax
