#include "history_topk.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
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
constexpr int64_t kRowBytes = int64_t{1} << 26;     // of the scores of targets with all items
constexpr int64_t kRowSlack = 64;                   // bytes past the last, which is read in whole vectors
constexpr int64_t kFewestRows = 16;                 // fewer at once would read the table too often
constexpr int64_t kRowCost = 2;
constexpr int64_t kRowQueries = 2048;               // in a piece of a target's
constexpr int64_t kOrdered = int64_t{1} << 23;      // queries of frequent targets that are sorted by target at once
constexpr int64_t kMostCounts = int64_t{1} << 20;   // of what several threads count side by side
constexpr int64_t kSketchBytes = int64_t{1} << 27;
constexpr int64_t kSketchCost = 6;
constexpr int64_t kAligned = 32;  // queries a piece of a user's has a multiple of: the panels of every level

using Order = std::vector<uint32_t>;  // of queries

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
Order order_of(const HistoryTopk& task) {
    int64_t query = 1;
    while (query < task.queries && (task.user == nullptr || in_order(task, query - 1, query))) ++query;
    if (query >= task.queries) return {};
    Order order(task.queries);
    std::iota(order.begin(), order.end(), uint32_t{0});
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
        return std::tie(task.user[a], task.end[a], a) < std::tie(task.user[b], task.end[b], b);
    });
    return order;
}

// Calls run(query, user, end) for the queries at places [first, last), which rise where there is no `user`.
template <class Run>
void for_each_query(const HistoryTopk& task, int64_t first, int64_t last, Run run) {
    int64_t user = 0;
    for (int64_t place = first; place < last; ++place) {
        const int64_t query = query_at(task, place);
        if (task.user != nullptr) {
            run(query, task.user[query], task.end[query]);
        } else {
            while (task.offsets[user + 1] <= query) ++user;
            run(query, user, query - task.offsets[user]);
        }
    }
}

// Whole users, or parts of those that are much work; the largest first, so that the last ones even out.
Plan plan_of(const HistoryTopk& task, int64_t places) {
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
    for_each_query(task, 0, places, [&](int64_t, int64_t user, int64_t end) {
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

// Making a row costs what six candidates save where the table lies in memory (N = 62,000), and more where the cache holds
// it (5,000). A large k would leave more candidates than are kept.
bool sketch_pays(const HistoryTopk& task, const Plan& plan) {
    const bool possible = task.k <= kLargestHistoryK / 2 && task.count * sketch_bytes(task.dim) <= kSketchBytes;
    return possible && plan.few_candidates >= kSketchCost * task.count;
}

int64_t longest_history(const HistoryTopk& task) {
    int64_t longest = 0;
    for (int64_t user = 0; user < task.users; ++user) {
        longest = std::max(longest, task.offsets[user + 1] - task.offsets[user]);
    }
    return longest;
}

// As many behaviours as the longest history has, or as the memory for packed ones lets all threads hold.
int64_t packed_block(const HistoryTopk& task, int64_t longest, int64_t threads) {
    const int64_t affordable = kPackedBytes / threads / (static_cast<int64_t>(sizeof(float)) * 2 * (task.dim + 2));
    const int64_t blocks = std::min((longest + kHistoryBlock - 1) / kHistoryBlock, affordable / kHistoryBlock);
    return std::max<int64_t>(blocks, 1) * kHistoryBlock;
}

using Buffer = std::unique_ptr<Memory>;

int64_t rows_at_once(const HistoryTopk& task) {
    return kRowBytes / (task.count * static_cast<int64_t>(sizeof(float)));
}

// In how many parts to go through the queries, of which each keeps so many counts.
int64_t parts_of(int64_t counts, int threads) {
    return std::clamp<int64_t>(kMostCounts / counts, 1, std::max(threads, 1));
}

// Calls run(part, first, last) for the places of each part, side by side.
template <class Run>
void for_each_part(const HistoryTopk& task, int64_t parts, int threads, Run run) {
    parallel_for(parts, threads, [&](int64_t part) {
        run(part, task.queries * part / parts, task.queries * (part + 1) / parts);
    });
}

// Targets that are compared with so many candidates that their scores with all items cost less.
struct Frequent {
    std::vector<int64_t> targets;
    std::vector<uint32_t> group;  // of each item: which of `targets` it is, or their number
    std::vector<int64_t> starts;  // how many queries groups before each have
};

// Making a score costs what kRowCost candidates cost more without it.
Frequent frequent_targets(const HistoryTopk& task, int64_t longest, int threads) {
    const int64_t least = kRowCost * task.count;
    const bool possible = task.k <= kLargestHistoryK && rows_at_once(task) >= kFewestRows;
    if (!possible || task.queries * longest < least) return {};
    struct Use {
        int64_t candidates, queries;
    };
    const int64_t parts = parts_of(2 * task.count, threads);
    std::vector<Use> uses(parts * task.count);
    for_each_part(task, parts, threads, [&](int64_t part, int64_t first, int64_t last) {
        for_each_query(task, first, last, [&](int64_t query, int64_t, int64_t end) {
            Use& use = uses[part * task.count + target_of(task, query)];
            use.candidates += end;
            ++use.queries;
        });
    });
    for (int64_t part = 1; part < parts; ++part) {
        for (int64_t item = 0; item < task.count; ++item) {
            uses[item].candidates += uses[part * task.count + item].candidates;
            uses[item].queries += uses[part * task.count + item].queries;
        }
    }
    uses.resize(task.count);
    const auto enough = [&](const Use& use) { return use.candidates >= least; };
    const auto others = static_cast<uint32_t>(std::count_if(uses.begin(), uses.end(), enough));
    Frequent found{{}, std::vector<uint32_t>(task.count, others), {0}};
    for (int64_t item = 0; item < task.count; ++item) {
        if (!enough(uses[item])) continue;
        found.group[item] = static_cast<uint32_t>(found.targets.size());
        found.targets.push_back(item);
        found.starts.push_back(found.starts.back() + uses[item].queries);
    }
    found.starts.push_back(task.queries);
    return found;
}

// The queries of some groups of targets, one after the other.
Order order_of_groups(const HistoryTopk& task, const Frequent& frequent, int64_t first, int64_t last, int threads) {
    const int64_t groups = last - first, parts = parts_of(groups, threads);
    std::vector<int64_t> next(parts * groups);  // where each part's next query of each group goes
    const auto for_each_of_these = [&](auto use) {
        for_each_part(task, parts, threads, [&](int64_t part, int64_t begin, int64_t end) {
            for (int64_t place = begin; place < end; ++place) {
                const int64_t query = query_at(task, place), group = frequent.group[target_of(task, query)];
                if (first <= group && group < last) use(query, next[part * groups + group - first]);
            }
        });
    };
    if (parts > 1) for_each_of_these([](int64_t, int64_t& count) { ++count; });
    for (int64_t group = 0; group < groups; ++group) {
        int64_t place = frequent.starts[first + group] - frequent.starts[first];
        for (int64_t part = 0; part < parts; ++part) {
            place += std::exchange(next[part * groups + group], place);
        }
    }
    Order order(frequent.starts[last] - frequent.starts[first]);
    for_each_of_these([&](int64_t query, int64_t& place) { order[place++] = static_cast<uint32_t>(query); });
    return order;
}

// Calls run(index, scratch) for each of `count` pieces of work, each thread with scratch memory of its own.
template <class Run>
void for_each_piece(int64_t count, int threads, int64_t scratch_bytes, bool large, Run run) {
    std::atomic<int64_t> next{0};
    parallel_for(std::min<int64_t>(count, threads), threads, [&](int64_t) {
        const Memory scratch(scratch_bytes, large);
        for (int64_t index; (index = next.fetch_add(1)) < count;) run(index, scratch.data());
    });
}

// The items of all behaviours in as few bytes as they need.
Buffer narrow_columns(const HistoryTopk& task, int threads) {
    constexpr int64_t kPart = int64_t{1} << 16;
    const int64_t behaviours = task.offsets[task.users];
    auto columns = std::make_unique<Memory>(behaviours * column_bytes(task.count));
    parallel_for((behaviours + kPart - 1) / kPart, threads, [&](int64_t part) {
        const int64_t first = part * kPart, last = std::min(first + kPart, behaviours);
        if (column_bytes(task.count) == 2) {
            std::copy(task.items + first, task.items + last, static_cast<uint16_t*>(columns->data()) + first);
        } else {
            std::copy(task.items + first, task.items + last, static_cast<uint32_t*>(columns->data()) + first);
        }
    });
    return columns;
}

std::vector<int64_t> users_of_steps(const HistoryTopk& task) {
    std::vector<int64_t> users;
    int64_t user = 0;
    for (int64_t behaviour = 0; behaviour < task.offsets[task.users]; behaviour += kUserStep) {
        while (task.offsets[user + 1] <= behaviour) ++user;
        users.push_back(user);
    }
    return users;
}

// Exact scores of `count` targets from `first` on with all items into `rows`, then their queries. The task's order leaves
// out as many queries as there are `before` it.
void search_rows(const HistoryTopk& task, const Frequent& frequent, int64_t first, int64_t count, int64_t before,
                 float* rows, bool large, int threads) {
    constexpr int64_t kItems = 256;
    const int64_t strips = (task.count + kItems - 1) / kItems;
    for_each_piece(strips, threads, count * history_row_bytes(task.dim), large, [&](int64_t strip, void* scratch) {
        const int64_t item = strip * kItems, last = std::min(item + kItems, task.count);
        level().history_topk_rows(task, &frequent.targets[first], count, item, last, rows, scratch);
    });
    struct Part {
        int64_t row, first, last;
    };
    std::vector<Part> parts;
    for (int64_t row = 0; row < count; ++row) {
        const int64_t last = frequent.starts[first + row + 1];
        for (int64_t place = frequent.starts[first + row]; place < last; place += kRowQueries) {
            parts.push_back({row, place - before, std::min(place + kRowQueries, last) - before});
        }
    }
    const auto pieces = static_cast<int64_t>(parts.size());
    for_each_piece(pieces, threads, level().history_topk_scratch(task), large, [&](int64_t index, void* scratch) {
        HistoryTopk part = task;
        part.row = rows + parts[index].row * task.count;
        level().history_topk(part, parts[index].first, parts[index].last, scratch);
    });
}

void search_frequent(HistoryTopk task, const Frequent& frequent, int threads) {
    const auto all = static_cast<int64_t>(frequent.targets.size());
    const int64_t at_once = std::min(rows_at_once(task), all);
    const bool large = all * task.count * task.dim >= kLargeWork;
    const Memory rows(at_once * task.count * static_cast<int64_t>(sizeof(float)) + kRowSlack, large);
    const Buffer columns = narrow_columns(task, threads);
    task.columns = columns->data();
    const std::vector<int64_t> users = task.user == nullptr ? users_of_steps(task) : std::vector<int64_t>();
    if (!users.empty()) task.user_at = users.data();
    const std::vector<int64_t>& starts = frequent.starts;
    for (int64_t first = 0, last = 0; first < all; first = last) {
        while (last < all && (last == first || starts[last + 1] - starts[first] <= kOrdered)) ++last;
        const Order order = order_of_groups(task, frequent, first, last, threads);
        HistoryTopk part = task;
        part.order = order.data();
        for (int64_t row = first; row < last; row += at_once) {
            const int64_t count = std::min(at_once, last - row);
            search_rows(part, frequent, row, count, starts[first], static_cast<float*>(rows.data()), large, threads);
        }
    }
}

Buffer sketch_of(HistoryTopk& task, int threads) {
    constexpr int64_t kRows = 512;
    auto sketch = std::make_unique<Memory>(task.count * sketch_bytes(task.dim));
    int8_t* const rows = static_cast<int8_t*>(sketch->data());
    const int64_t pieces = (task.count + kRows - 1) / kRows;
    std::vector<HistorySketchBound> bounds(pieces);
    parallel_for(pieces, threads, [&](int64_t piece) {
        const int64_t first = piece * kRows, last = std::min(first + kRows, task.count);
        bounds[piece] = level().history_topk_sketch(task, first, last, rows);
    });
    for (const HistorySketchBound& bound : bounds) {
        task.sketch_norm = std::max(task.sketch_norm, bound.norm);
        task.sketch_residual = std::max(task.sketch_residual, bound.residual);
    }
    task.sketch = rows;
    return sketch;
}

void advise_results(const HistoryTopk& task) {
    advise_large_pages(task.positions, task.queries * task.k * static_cast<int64_t>(sizeof(int64_t)));
    advise_large_pages(task.scores, task.queries * task.k * static_cast<int64_t>(sizeof(float)));
}

}  // namespace

void history_topk(HistoryTopk task, int threads) {
    if (task.queries == 0) return;  // their arrays, empty, may be at null, which elsewhere asks for every behaviour
    if (task.queries > kMostHistoryQueries) {
        throw std::length_error("target: expected fewer than 2^32 queries, got " + std::to_string(task.queries));
    }
    Order order = order_of(task);
    task.order = order.empty() ? nullptr : order.data();
    task.block = kHistoryBlock;
    int64_t places = task.queries;
    const int64_t longest = longest_history(task);
    const Frequent frequent = frequent_targets(task, longest, threads);
    if (!frequent.targets.empty()) {
        advise_results(task);
        search_frequent(task, frequent, threads);
        const auto others = static_cast<int64_t>(frequent.targets.size());
        order = order_of_groups(task, frequent, others, others + 1, threads);
        task.order = order.data();
        places = static_cast<int64_t>(order.size());
    }
    const Plan plan = plan_of(task, places);
    const bool large = plan.candidates * task.dim >= kLargeWork;
    if (large) advise_results(task);
    const int64_t pieces = static_cast<int64_t>(plan.pieces.size());
    task.block = packed_block(task, longest, std::clamp<int64_t>(pieces, 1, threads));
    Buffer sketch;
    if (sketch_pays(task, plan)) sketch = sketch_of(task, threads);
    for_each_piece(pieces, threads, level().history_topk_scratch(task), large, [&](int64_t index, void* scratch) {
        level().history_topk(task, plan.pieces[index].first, plan.pieces[index].last, scratch);
    });
}

}  // namespace rellax
