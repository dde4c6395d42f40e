#include "item_topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "dispatch.h"
#include "pages.h"
#include "parallel.h"
#include "scratch.h"

namespace rellax {
namespace {

constexpr int64_t kPanelRows = 32;       // every level's panel_rows divides it
constexpr int64_t kMostRows = 1024;          // of a block: few enough for a core's own cache to hold one
constexpr int64_t kColumns = 8192;           // items packed at a time where they are not the queries as well
constexpr int64_t kMatched = int64_t{1} << 37;  // multiplications of a step, about: a second or two of two threads
constexpr int64_t kSettled = int64_t{1} << 15;  // queries that one step settles

constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t whole_panels(int64_t rows) { return divided_up(rows, kPanelRows) * kPanelRows; }

// Room for `rows` packed rows.
class Packing {
public:
    Packing(int64_t rows, int64_t panel_bytes, int64_t panel_rows)
        : panels_(whole_panels(rows) / panel_rows * panel_bytes),
          norm_(whole_panels(rows)),
          error_(whole_panels(rows)),
          panel_bytes_(panel_bytes),
          panel_rows_(panel_rows) {}

    // The rows from `row` on, a multiple of kPanelRows.
    PackedRows from(int64_t row) {
        return {static_cast<char*>(panels_.data()) + row / panel_rows_ * panel_bytes_, norm_.data() + row,
                error_.data() + row};
    }

private:
    Memory panels_;
    std::vector<float> norm_, error_;
    int64_t panel_bytes_, panel_rows_;
};

// A sample holds more of the k best items than this with a probability of 10^-5; `share` of all items are sampled.
int64_t most_of_best(int64_t k, double share) {
    const double mean = static_cast<double>(k) * share;
    double probability = std::exp(-mean), more = 1 - probability;
    int64_t most = 0;
    while (more > 1e-5) {
        probability *= mean / static_cast<double>(++most);
        more -= probability;
    }
    return most;
}

// How many blocks the queries make: two for each thread, or a multiple of that, and one, so that a round of blocks
// against blocks keeps every thread busy to its end.
int64_t blocks_of(int64_t rows, int64_t threads) {
    return 2 * threads * std::max<int64_t>(divided_up(divided_up(rows, kMostRows) - 1, 2 * threads), 1) + 1;
}

}  // namespace

struct ItemTopkSearch::State {
    State(const ItemTopk& asked, int most_threads)
        : task(asked),
          threads(most_threads),
          kernels(level().item_topk),
          mutual(asked.query == nullptr),
          blocks(blocks_of(asked.queries, most_threads)),
          block_rows(whole_panels(divided_up(asked.queries, blocks))),
          queries(packing(asked.queries)),
          items(packing(mutual ? 0 : std::min(asked.items, kColumns))),
          floor(whole_panels(asked.queries), -std::numeric_limits<float>::infinity()),
          size(asked.queries),
          capacity(std::max(2 * asked.k, asked.k + 64)),
          busy(mutual ? blocks : 0),
          candidates(asked.queries * capacity * sizeof(Candidate)),
          lists{capacity, floor.data(), size.data(), static_cast<Candidate*>(candidates.data())} {}

    Packing packing(int64_t rows) const { return {rows, kernels.panel_bytes(task.dim), kernels.panel_rows}; }

    int64_t match_steps() const {
        return mutual ? 1 + divided_up(blocks, rounds_of_step()) : divided_up(task.items, kColumns) * turns();
    }

    int64_t rounds_of_step() const {
        const int64_t work = blocks / 2 * block_rows * block_rows * std::max<int64_t>(task.dim, 1);
        return std::max<int64_t>(kMatched / work, 1);
    }

    // Blocks of queries that meet the same columns in one step, and how many steps all of them take.
    int64_t blocks_of_turn() const {
        const int64_t round = 2 * threads, work = kColumns * block_rows * std::max<int64_t>(task.dim, 1) * round;
        return round * std::max<int64_t>(kMatched / work, 1);
    }
    int64_t turns() const { return divided_up(query_blocks(), blocks_of_turn()); }

    int64_t query_blocks() const { return divided_up(task.queries, block_rows); }

    RowRange block(int64_t index) const {
        return {std::min(index * block_rows, task.queries), std::min((index + 1) * block_rows, task.queries)};
    }

    // Items `range` of those at `item` (null: of all) into row 0 on of `packing`.
    void pack(const int64_t* item, RowRange range, Packing& packing) const {
        parallel_for(divided_up(range.last - range.first, kPanelRows), threads, [&](int64_t panel) {
            const int64_t first = range.first + panel * kPanelRows;
            const RowRange rows{first, std::min(first + kPanelRows, range.last)};
            kernels.pack(task, item, rows, packing.from(panel * kPanelRows));
        });
    }

    // First floors of the lists. None for few items, of which the lists hold many.
    void start() {
        if (task.items < 2 * kSampled) return;
        const double share = static_cast<double>(kSampled) / static_cast<double>(task.items);
        const int64_t rank = most_of_best(task.k + task.exclude_self, share) + 1;
        if (rank > kSampled) return;
        std::mt19937 random;
        std::vector<int64_t> drawn(kSampled);
        for (int64_t& item : drawn) item = random() % task.items;
        Packing sample = packing(kSampled);
        pack(drawn.data(), {0, kSampled}, sample);
        parallel_for(query_blocks(), threads, [&](int64_t index) {
            kernels.start(task, queries.from(0), block(index), {sample.from(0), rank}, lists);
        });
    }

    void match(const ItemTopkBlock& work) const {
        const Scratch scratch(item_topk_scratch(task.dim, lists.capacity));
        kernels.match(task, work, scratch.data());
    }

    // Each block against itself, then as in a tournament: in each round a block meets one other, and after all rounds
    // it has met every one once. Blocks i and j meet in the round r with i + j = 2 r modulo their number, which is
    // odd. So each product is computed once. A thread that is through with its part of a round goes on with the next,
    // unless one of its two blocks is still being worked on.
    void match_mutually(int64_t step) {
        if (step == 0) return parallel_for(blocks, threads, [&](int64_t i) { match_blocks(i, i); });
        const int64_t first = (step - 1) * rounds_of_step(), last = std::min(first + rounds_of_step(), blocks);
        const int64_t pairs = blocks / 2;
        parallel_for((last - first) * pairs, threads, [&](int64_t index) {
            const int64_t round = first + index / pairs, pair = index % pairs;
            const int64_t i = (round + 1 + pair) % blocks, j = (round + blocks - 1 - pair) % blocks;
            const std::scoped_lock both(busy[i], busy[j]);
            match_blocks(i, j);
        });
    }

    void match_blocks(int64_t i, int64_t j) {
        const PackedRows all = queries.from(0);
        match({all, block(i), all, block(j), 0, true, lists});
    }

    void match_columns(int64_t step) {
        const int64_t first = step / turns() * kColumns, first_block = step % turns() * blocks_of_turn();
        const RowRange range{first, std::min(first + kColumns, task.items)}, columns{0, range.last - range.first};
        if (first_block == 0) pack(nullptr, range, items);
        const int64_t last_block = std::min(first_block + blocks_of_turn(), query_blocks());
        parallel_for(last_block - first_block, threads, [&](int64_t index) {
            match({queries.from(0), block(first_block + index), items.from(0), columns, range.first, false, lists});
        });
    }

    void settle(int64_t step) const {
        constexpr int64_t kPiece = 64;
        const int64_t first = step * kSettled, last = std::min(first + kSettled, task.queries);
        parallel_for(divided_up(last - first, kPiece), threads, [&](int64_t piece) {
            const RowRange rows{first + piece * kPiece, std::min(first + (piece + 1) * kPiece, last)};
            const Scratch scratch(item_topk_scratch(task.dim, lists.capacity));
            kernels.settle(task, rows, lists, scratch.data());
            for (int64_t row = rows.first; row < rows.last; ++row) write(row);
        });
    }

    void write(int64_t row) const {
        Candidate* const best = lists.candidates + row * lists.capacity;
        std::sort(best, best + lists.size[row], [](const Candidate& a, const Candidate& b) {
            return a.lower > b.lower || (a.lower == b.lower && a.item < b.item);
        });
        for (int64_t i = 0; i < task.k; ++i) {
            const bool found = i < lists.size[row];
            task.indices[row * task.k + i] = found ? int64_t{best[i].item} : -1;
            task.scores[row * task.k + i] = found ? best[i].lower : -std::numeric_limits<float>::infinity();
        }
    }

    bool step() {
        if (task.queries == 0) return false;
        const int64_t step = next++ - 1, matches = match_steps();
        if (step < 0) {
            pack(task.query, {0, task.queries}, queries);
            start();
        } else if (step < matches) {
            mutual ? match_mutually(step) : match_columns(step);
        } else if (step < matches + divided_up(task.queries, kSettled)) {
            settle(step - matches);
        } else {
            return false;
        }
        return true;
    }

    const ItemTopk task;
    const int threads;
    const ItemTopkKernels& kernels;
    const bool mutual;
    const int64_t blocks, block_rows;
    Packing queries, items;
    std::vector<float> floor;
    std::vector<int32_t> size;
    const int64_t capacity;
    std::vector<std::mutex> busy;  // a block each
    const Memory candidates;
    const Shortlists lists;
    int64_t next = 0;
};

ItemTopkSearch::ItemTopkSearch(const ItemTopk& task, int threads) : state_(std::make_unique<State>(task, threads)) {}

ItemTopkSearch::~ItemTopkSearch() = default;

bool ItemTopkSearch::step() { return state_->step(); }

}  // namespace rellax
