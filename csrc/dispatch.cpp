#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace rellax {

#define RELLAX_DECLARE_LEVEL(level)            \
    namespace level {                          \
    AnswerKernel answer;                       \
    CfloraKernel cflora_forward;               \
    CfloraKernel cflora_backward;              \
    CfloraOuterKernel cflora_outer;            \
    GateBankForwardKernel gate_bank_forward;   \
    GateBankBackwardKernel gate_bank_backward; \
    HistoryTopkKernel history_topk;            \
    HistoryTopkScratch history_topk_scratch;   \
    HistoryRowsKernel history_topk_rows;       \
    HistorySketchKernel history_topk_sketch;   \
    extern const ItemTopkKernels item_topk;    \
    ConvertKernel convert;                     \
    RowSumsKernel row_sums;                    \
    }
RELLAX_DECLARE_LEVEL(baseline)
RELLAX_DECLARE_LEVEL(avx2)
RELLAX_DECLARE_LEVEL(avx512)
RELLAX_DECLARE_LEVEL(avx512_bf16)
#undef RELLAX_DECLARE_LEVEL

namespace {

#define RELLAX_KERNELS(level)                                                                              \
    level::answer, level::cflora_forward, level::cflora_backward, level::cflora_outer,                     \
        level::gate_bank_forward, level::gate_bank_backward, level::history_topk,                          \
        level::history_topk_scratch, level::history_topk_rows, level::history_topk_sketch,                \
        level::item_topk, level::convert, level::row_sums

#ifdef RELLAX_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Level kLevels[] = {
    {"baseline", [] { return true; }, RELLAX_KERNELS(baseline)},
#ifdef RELLAX_X86
    {"avx2", has_avx2, RELLAX_KERNELS(avx2)},
    {"avx512", has_avx512, RELLAX_KERNELS(avx512)},
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, RELLAX_KERNELS(avx512_bf16)},
#endif
};
#undef RELLAX_KERNELS

const Level& choose() {
    const std::vector<const Level*> supported = supported_levels();
    const char* wanted = std::getenv("RELLAX_ISA");
    if (wanted == nullptr || *wanted == '\0') return *supported.back();
    std::string names;
    for (const Level* level : supported) {
        if (std::string(wanted) == level->name) return *level;
        names += (names.empty() ? "" : ", ") + std::string(level->name);
    }
    throw std::invalid_argument("RELLAX_ISA: expected a level that this machine can run (" + names + "), got '" +
                                wanted + "'");
}

}  // namespace

std::vector<const Level*> supported_levels() {
    std::vector<const Level*> supported;
    for (const Level& level : kLevels) {
        if (level.runs_here()) supported.push_back(&level);
    }
    return supported;
}

const Level& level() {
    static const Level& chosen = choose();
    return chosen;
}

}  // namespace rellax
