#include "soft_prompt.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "pages.h"
#include "parallel.h"

namespace rellax {
namespace {

constexpr int64_t kPieceBytes = int64_t{512} << 10;  // that a thread takes at once
constexpr int64_t kThreadBytes = int64_t{1} << 19;  // for which a further thread is worth its waking
constexpr int64_t kPrefetched = 2048;               // bytes of a row: the hardware fetches what follows them

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

const char* row_of(const Rows& rows, int64_t index) {
    return static_cast<const char*>(rows.data) + index * rows.stride * size_of(rows.dtype);
}

[[noreturn]] void throw_no_row(const std::string& argument, const std::string& table, int64_t count, int64_t got) {
    throw std::invalid_argument(argument + ": expected a row of " + table + ", in [0, " + std::to_string(count) +
                                "), got " + std::to_string(got));
}

// Inlined before GCC looks at it: it drops calls of a function that does nothing but prefetch.
__attribute__((always_inline)) inline void prefetch(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < std::min(bytes, kPrefetched); i += 64) __builtin_prefetch(row + i);
}

// The first row of each piece of about equal work, and one past the last row: a row costs its tokens and itself.
std::vector<int64_t> pieces_of_equal_work(const std::vector<int64_t>& start) {
    constexpr int64_t kWork = 256;
    std::vector<int64_t> first{0};
    const auto count = static_cast<int64_t>(start.size()) - 1;
    int64_t done = 0;
    for (int64_t row = 1; row <= count; ++row) {
        if (start[row] + row - done < kWork && row < count) continue;
        first.push_back(row);
        done = start[row] + row;
    }
    return first;
}

}  // namespace

void soft_prompt(const SoftPrompt& task, int threads) {
    ConvertKernel* const convert = level().convert;
    const Dtype dtype = task.words.dtype;
    const int64_t bytes = task.d * size_of(dtype), total = task.tokens * bytes;
    const auto source = [&](int64_t token) {
        const int64_t soft = task.soft_index[token], word = task.input_ids[token];
        if (soft >= task.soft.count) throw_no_row("soft_index", "soft_rows", task.soft.count, soft);
        if (soft >= 0) return row_of(task.soft, soft);
        if (word < 0 || word >= task.words.count) throw_no_row("input_ids", "word_embeddings", task.words.count, word);
        return row_of(task.words, word);
    };
    const auto write = [&](int64_t token, char* target) {
        const bool soft = task.soft_index[token] >= 0;
        const Dtype from = soft ? task.soft.dtype : dtype;
        const float factor = soft ? 1.0f : task.word_scale;
        if (from == dtype && factor == 1.0f) {
            std::memcpy(target, source(token), bytes);
        } else {
            convert(from, source(token), factor, dtype, target, task.d);
        }
    };
    // Malloc may have just mapped this: 4 KiB at a time, handing it over takes longer than all the copying.
    advise_large_pages(task.out, total);
    const auto tokens_of = [&](int64_t size) { return std::max<int64_t>(size / std::max<int64_t>(bytes, 1), 1); };
    const int64_t piece = tokens_of(kPieceBytes), ahead = tokens_of(kBytesAhead);
    const int64_t pieces = (task.tokens + piece - 1) / piece;
    parallel_for(pieces, threads_for(total, kThreadBytes, threads), [&](int64_t index) {
        const int64_t last = std::min((index + 1) * piece, task.tokens);
        for (int64_t token = index * piece; token < last; ++token) {
            if (token + ahead < last) prefetch(source(token + ahead), bytes);
            write(token, static_cast<char*>(task.out) + token * bytes);
        }
    });
}

void row_sums(const RowSums& task, int threads) {
    RowSumsKernel* const kernel = level().row_sums;
    const auto counted = [&](int64_t token) { return task.index[token] >= 0 && task.index[token] < task.count; };
    // A counting sort: the tokens of sum i, in order, from start[i] on.
    std::vector<int64_t> start(task.count + 1);
    for (int64_t t = 0; t < task.rows.count; ++t) {
        if (counted(t)) ++start[task.index[t]];
    }
    std::exclusive_scan(start.begin(), start.end(), start.begin(), int64_t{0});
    std::vector<int64_t> token(start.back()), next(start);
    for (int64_t t = 0; t < task.rows.count; ++t) {
        if (counted(t)) token[next[task.index[t]]++] = t;
    }
    const std::vector<int64_t> first = pieces_of_equal_work(start);
    const int64_t pieces = static_cast<int64_t>(first.size()) - 1;
    const int64_t blocks = (task.d + kSumColumns - 1) / kSumColumns;
    const int64_t row_bytes = task.d * size_of(task.dtype), total = (start.back() + task.count) * row_bytes;
    advise_large_pages(task.out, task.count * row_bytes);
    parallel_for(pieces * blocks, threads_for(total, kThreadBytes, threads), [&](int64_t index) {
        const int64_t piece = index / blocks, column = index % blocks * kSumColumns;
        kernel(task, start.data(), token.data(), first[piece], first[piece + 1], column,
               std::min(column + kSumColumns, task.d));
    });
}

}  // namespace rellax
