#include "history_topk.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace rellax {
namespace {

// Multiplications in one piece of work: long enough to hide the hand-over, short enough that the last piece keeps
// nobody waiting.
constexpr int64_t kLeastWork = int64_t{1} << 22;
constexpr int64_t kMostWork = int64_t{1} << 31;
constexpr int64_t kPackedBytes = int64_t{1} << 26;  // of all threads
constexpr int64_t kAligned = 32;  // queries a piece of a user's has a multiple of: the panels of every level

struct Piece {
    int64_t first, last, work;
};

bool in_order(const HistoryTopk& task, int64_t a, int64_t b) {
    return std::tie(task.user[a], task.end[a]) <= std::tie(task.user[b], task.end[b]);
}

// The queries by user and end; empty where they come so.
std::vector<int64_t> order_of(const HistoryTopk& task) {
    int64_t query = 1;
    while (query < task.queries && (task.user == nullptr || in_order(task, query - 1, query))) ++query;
    if (query >= task.queries) return {};
    std::vector<int64_t> order(task.queries);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return std::tie(task.user[a], task.end[a], a) < std::tie(task.user[b], task.end[b], b);
    });
    return order;
}

// Calls run(user, end) for each query in order.
template <class Run>
void for_each_query(const HistoryTopk& task, Run run) {
    if (task.user == nullptr) {
        for (int64_t user = 0; user < task.users; ++user) {
            for (int64_t end = 0; end < task.offsets[user + 1] - task.offsets[user]; ++end) run(user, end);
        }
    } else {
        for (int64_t place = 0; place < task.queries; ++place) {
            const int64_t query = task.order == nullptr ? place : task.order[place];
            run(task.user[query], task.end[query]);
        }
    }
}

// Whole users, or parts of those that are much work; the largest first, so that the last ones even out.
std::vector<Piece> pieces_by_work(const HistoryTopk& task) {
    std::vector<Piece> pieces;
    Piece piece{0, 0, 0};
    int64_t last_user = -1, of_user = 0;
    const auto close = [&] {
        pieces.push_back(piece);
        piece = {piece.last, piece.last, 0};
    };
    for_each_query(task, [&](int64_t user, int64_t end) {
        of_user = user == last_user ? of_user + 1 : 0;
        const bool may_part = of_user == 0 ? piece.work >= kLeastWork : of_user % kAligned == 0 && piece.work >= kMostWork;
        if (may_part) close();
        last_user = user;
        piece.work += (end + 1) * task.dim;
        ++piece.last;
    });
    if (piece.last > piece.first) close();
    std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
        return std::tie(b.work, a.first) < std::tie(a.work, b.first);
    });
    return pieces;
}

// As many behaviours as the longest history has, or as the memory for packed ones lets all threads hold.
int64_t packed_block(const HistoryTopk& task, int threads) {
    int64_t longest = 0;
    for (int64_t user = 0; user < task.users; ++user) {
        longest = std::max(longest, task.offsets[user + 1] - task.offsets[user]);
    }
    const int64_t affordable = kPackedBytes / threads / (static_cast<int64_t>(sizeof(float)) * 2 * (task.dim + 2));
    const int64_t blocks = std::min((longest + kHistoryBlock - 1) / kHistoryBlock, affordable / kHistoryBlock);
    return std::max<int64_t>(blocks, 1) * kHistoryBlock;
}

}  // namespace

void history_topk(HistoryTopk task, int threads) {
    constexpr std::align_val_t kAlignment{64};
    const std::vector<int64_t> order = order_of(task);
    task.order = order.empty() ? nullptr : order.data();
    const std::vector<Piece> pieces = pieces_by_work(task);
    const int workers = static_cast<int>(std::min<size_t>(threads, pieces.size()));
    task.block = packed_block(task, std::max(workers, 1));
    const int64_t scratch_bytes = level().history_topk_scratch(task);
    std::atomic<size_t> next{0};
    parallel_for(workers, workers, [&](int64_t) {
        const auto free = [&](void* memory) { ::operator delete(memory, kAlignment); };
        const std::unique_ptr<void, decltype(free)> scratch(::operator new(scratch_bytes, kAlignment), free);
        for (size_t index; (index = next.fetch_add(1)) < pieces.size();) {
            level().history_topk(task, pieces[index].first, pieces[index].last, scratch.get());
        }
    });
}

}  // namespace rellax
