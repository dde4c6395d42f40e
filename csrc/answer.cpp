#include "answer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace rellax {
namespace {

// lse and mean of one row, from the sums of all slices in their order.
void merge(const Answer& task, const std::vector<AnswerSums>& slices, int64_t row) {
    float largest = -INFINITY, total = 0.0f;
    for (const AnswerSums& slice : slices) largest = std::max(largest, slice.largest[row]);
    std::vector<float> factor;
    for (const AnswerSums& slice : slices) {
        factor.push_back(std::exp(slice.largest[row] - largest));
        total += factor.back() * slice.total[row];
    }
    task.lse[row] = largest + std::log(total);
    if (task.mean == nullptr) return;
    float* const mean = task.mean + row * task.d;
    std::fill_n(mean, task.d, 0.0f);
    for (size_t i = 0; i < slices.size(); ++i) {
        const float* const part = slices[i].mean + row * task.d;
        const float share = factor[i] / total;
        for (int64_t j = 0; j < task.d; ++j) mean[j] += share * part[j];
    }
}

}  // namespace

void answer_forward(const Answer& task, int threads) {
    AnswerKernel* const kernel = level().answer;
    const int64_t count = (task.vocabulary + kAnswerSlice - 1) / kAnswerSlice;
    const int64_t columns = 2 + (task.mean == nullptr ? 0 : task.d);
    std::vector<float> memory(count * task.n * columns);
    std::vector<AnswerSums> slices;
    for (int64_t i = 0; i < count; ++i) {
        float* const at = memory.data() + i * task.n * columns;
        slices.push_back({at, at + task.n, task.mean == nullptr ? nullptr : at + 2 * task.n});
    }
    parallel_for(count, threads, [&](int64_t i) {
        std::vector<float> scratch(task.n * kAnswerTile);
        kernel(task, i * kAnswerSlice, std::min((i + 1) * kAnswerSlice, task.vocabulary), slices[i], scratch.data());
    });
    parallel_for(task.n, threads, [&](int64_t row) { merge(task, slices, row); });
}

}  // namespace rellax
