#include "history_topk.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <numeric>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "pages.h"
#include "parallel.h"

namespace rellax {
namespace {

// Multiplications in one piece of work: long enough to hide the hand-over, short enough that the last piece keeps
// nobody waiting.
constexpr int64_t kLeastWork = int64_t{1} << 22;
constexpr int64_t kMostWork = int64_t{1} << 31;
constexpr int64_t kLargeWork = int64_t{1} << 30;  // multiplications that large pages pay for
constexpr int64_t kPackedBytes = int64_t{1} << 26;  // of all threads
constexpr int64_t kTableBytes = int64_t{1} << 27;  // of the scores of all pairs, or of a sketch
constexpr int64_t kPairCost = 2;
constexpr int64_t kSketchCost = 4;
constexpr int64_t kAligned = 32;  // queries a piece of a user's has a multiple of: the panels of every level

struct Piece {
    int64_t first, last, work;
};

struct Plan {
    std::vector<Piece> pieces;
    int64_t candidates;      // of all queries
    int64_t few_candidates;  // of the queries whose users have fewer than kFewHistoryQueries
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
Plan plan_of(const HistoryTopk& task) {
    Plan plan{{}, 0, 0};
    Piece piece{0, 0, 0};
    int64_t last_user = -1, of_user = 0, of_user_candidates = 0;
    const auto close_piece = [&] {
        if (piece.last > piece.first) plan.pieces.push_back(piece);
        piece = {piece.last, piece.last, 0};
    };
    const auto close_user = [&] {
        plan.candidates += of_user_candidates;
        if (of_user < kFewHistoryQueries) plan.few_candidates += of_user_candidates;
        of_user = of_user_candidates = 0;
    };
    for_each_query(task, [&](int64_t user, int64_t end) {
        if (user != last_user) {
            close_user();
            if (piece.work >= kLeastWork) close_piece();
        } else if (of_user % kAligned == 0 && piece.work >= kMostWork) {
            close_piece();
        }
        last_user = user;
        ++of_user;
        of_user_candidates += end;
        piece.work += (end + 1) * task.dim;
        ++piece.last;
    });
    close_user();
    close_piece();
    std::sort(plan.pieces.begin(), plan.pieces.end(), [](const Piece& a, const Piece& b) {
        return std::tie(b.work, a.first) < std::tie(a.work, b.first);
    });
    return plan;
}

int64_t pairs_bytes(const HistoryTopk& task) { return task.count * task.count * static_cast<int64_t>(sizeof(float)); }

// Making the score of a pair costs what two candidates cost more without it; measured at N = 4,000, fewer pay sooner.
bool pairs_pay(const HistoryTopk& task, const Plan& plan) {
    return pairs_bytes(task) <= kTableBytes && plan.candidates >= kPairCost * task.count * task.count;
}

int64_t sketch_bytes(const HistoryTopk& task) { return task.count * sketch_width(task.dim) * 2; }

// Making a row costs two reads of it, and saves half of each later one: measured at N = 5,000 and 62,000.
bool sketch_pays(const HistoryTopk& task, const Plan& plan) {
    return sketch_bytes(task) <= kTableBytes && plan.few_candidates >= kSketchCost * task.count;
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

// Memory without a constructor's pass over it; in large pages where it is used for long enough to pay for them.
class Memory {
public:
    explicit Memory(int64_t bytes, bool large = true) : data_(::operator new(bytes, kAlignment)) {
        if (large) advise_large_pages(data_, bytes);
    }
    ~Memory() { ::operator delete(data_, kAlignment); }
    Memory(const Memory&) = delete;
    void* data() const { return data_; }

private:
    static constexpr std::align_val_t kAlignment{64};
    void* data_;
};

using Buffer = std::unique_ptr<Memory>;

Buffer all_pairs(HistoryTopk& task, int threads) {
    constexpr int64_t kRows = 64;
    auto pairs = std::make_unique<Memory>(pairs_bytes(task));
    float* const scores = static_cast<float*>(pairs->data());
    const int64_t pieces = (task.count + kRows - 1) / kRows, scratch_bytes = level().history_topk_scratch(task);
    parallel_for(pieces, threads, [&](int64_t piece) {
        const Memory scratch(scratch_bytes);
        const int64_t first = (pieces - 1 - piece) * kRows;  // the longest first
        level().history_topk_pairs(task, first, std::min(first + kRows, task.count), scores, scratch.data());
    });
    task.pairs = scores;
    return pairs;
}

Buffer sketch_of(HistoryTopk& task, int threads) {
    constexpr int64_t kRows = 512;
    auto sketch = std::make_unique<Memory>(sketch_bytes(task));
    const int64_t pieces = (task.count + kRows - 1) / kRows;
    std::vector<HistorySketchBound> bounds(pieces);
    parallel_for(pieces, threads, [&](int64_t piece) {
        const int64_t first = piece * kRows, last = std::min(first + kRows, task.count);
        bounds[piece] = level().history_topk_sketch(task, first, last, sketch->data());
    });
    for (const HistorySketchBound& bound : bounds) {
        task.sketch_norm = std::max(task.sketch_norm, bound.norm);
        task.sketch_residual = std::max(task.sketch_residual, bound.residual);
    }
    task.sketch = sketch->data();
    return sketch;
}

}  // namespace

void history_topk(HistoryTopk task, int threads) {
    if (task.queries == 0) return;  // their arrays, empty, may be at null, which elsewhere asks for every behaviour
    const std::vector<int64_t> order = order_of(task);
    task.order = order.empty() ? nullptr : order.data();
    const Plan plan = plan_of(task);
    const int workers = static_cast<int>(std::max<size_t>(std::min<size_t>(threads, plan.pieces.size()), 1));
    task.block = packed_block(task, workers);
    Buffer pairs, sketch;
    if (pairs_pay(task, plan)) {
        pairs = all_pairs(task, threads);
    } else if (sketch_pays(task, plan)) {
        sketch = sketch_of(task, threads);
    }
    const int64_t scratch_bytes = level().history_topk_scratch(task);
    const bool large = plan.candidates * task.dim >= kLargeWork;
    if (large) {
        advise_large_pages(task.positions, task.queries * task.k * static_cast<int64_t>(sizeof(int64_t)));
        advise_large_pages(task.scores, task.queries * task.k * static_cast<int64_t>(sizeof(float)));
    }
    std::atomic<size_t> next{0};
    parallel_for(workers, workers, [&](int64_t) {
        const Memory scratch(scratch_bytes, large);
        for (size_t index; (index = next.fetch_add(1)) < plan.pieces.size();) {
            level().history_topk(task, plan.pieces[index].first, plan.pieces[index].last, scratch.data());
        }
    });
}

}  // namespace rellax
