#include "history_topk.h"

#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace rellax {
namespace {

// Multiplications in one piece of work, some milliseconds: long enough to hide the hand-over, short enough that the
// last piece keeps nobody waiting. A constant, so that the pieces are the same for any number of threads.
constexpr int64_t kPieceWork = int64_t{1} << 24;

// The first query of each piece, and one past the last query.
std::vector<int64_t> pieces_of_equal_work(const HistoryTopk& task) {
    std::vector<int64_t> first{0};
    int64_t work = 0;
    for (int64_t query = 0; query < task.queries; ++query) {
        work += (task.end[query] + 1) * task.dim;
        if (work >= kPieceWork || query + 1 == task.queries) {
            first.push_back(query + 1);
            work = 0;
        }
    }
    return first;
}

}  // namespace

void history_topk(const HistoryTopk& task, int threads) {
    HistoryTopkKernel* const kernel = level().history_topk;
    const std::vector<int64_t> first = pieces_of_equal_work(task);
    parallel_for(static_cast<int64_t>(first.size()) - 1, threads, [&](int64_t piece) {
        std::vector<float> scratch(kMaxBlock * padded(task.dim));
        kernel(task, first[piece], first[piece + 1], scratch.data());
    });
}

}  // namespace rellax
