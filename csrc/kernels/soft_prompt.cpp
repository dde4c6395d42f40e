// Compiled once per ISA level, with the level as namespace. Nothing of the standard library but <cstdint> may be
// used here: the linker keeps one copy of an inline function, and that could be the one for the newest machine.
#include "soft_prompt.h"

#include "vector.h"

namespace rellax::RELLAX_LEVEL {
namespace {

template <class From, class To>
void convert_row(const From* source, float factor, To* target, int64_t d) {
    int64_t j = 0;
    for (; j + kWidth <= d; j += kWidth) store(target + j, factor * load(source + j));
    if (j < d) store_some(target + j, factor * load_some(source + j, d - j), d - j);
}

template <class T>
void add_row(const T* row, int64_t d, float* sums) {
    int64_t j = 0;
    for (; j + kWidth <= d; j += kWidth) store(sums + j, load(sums + j) + load(row + j));
    if (j < d) store(sums + j, load(sums + j) + load_some(row + j, d - j));
}

}  // namespace

void convert(Dtype from, const void* source, float factor, Dtype to, void* target, int64_t d) {
    with_type(from, [&](auto from_type) {
        with_type(to, [&](auto to_type) {
            convert_row(static_cast<const decltype(from_type)*>(source), factor,
                        static_cast<decltype(to_type)*>(target), d);
        });
    });
}

void row_sums(const RowSums& task, const int64_t* start, const int64_t* token, int64_t first_row, int64_t last_row,
              int64_t first_column, int64_t last_column) {
    const int64_t columns = last_column - first_column;
    with_type(task.rows.dtype, [&](auto from_type) {
        with_type(task.dtype, [&](auto to_type) {
            const auto* rows = static_cast<const decltype(from_type)*>(task.rows.data) + first_column;
            auto* out = static_cast<decltype(to_type)*>(task.out) + first_column;
            const auto row_of = [&](int64_t i) { return rows + token[i] * task.rows.stride; };
            const int64_t bytes = columns * int64_t{sizeof *rows}, in_line = kBytesAhead / bytes;
            const int64_t ahead = in_line > 1 ? in_line : 1;
            for (int64_t row = first_row; row < last_row; ++row) {
                const int64_t first = start[row], last = start[row + 1];
                for (int64_t i = first; i < last; ++i) {
                    if (i + ahead < start[last_row]) prefetch_bytes<0, 3>(row_of(i + ahead), bytes);
                }
                if (last - first == 1) {
                    convert_row(row_of(first), task.factor, out + row * task.d, columns);
                    continue;
                }
                float sums[kSumColumns] = {};
                for (int64_t i = first; i < last; ++i) add_row(row_of(i), columns, sums);
                convert_row(sums, task.factor, out + row * task.d, columns);
            }
        });
    });
}

}  // namespace rellax::RELLAX_LEVEL
