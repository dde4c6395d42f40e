// Chooses, once, which compilation of the kernels runs on this machine.
#pragma once

#include <vector>

#include "answer.h"
#include "cflora.h"
#include "gate_bank.h"
#include "history_topk.h"
#include "item_topk.h"
#include "soft_prompt.h"

namespace rellax {

// One compilation of all kernels; a further kernel is a further field.
struct Level {
    const char* name;
    bool (*runs_here)();
    AnswerKernel* answer;
    CfloraKernel* cflora_forward;
    CfloraKernel* cflora_backward;
    CfloraOuterKernel* cflora_outer;
    GateBankForwardKernel* gate_bank_forward;
    GateBankBackwardKernel* gate_bank_backward;
    HistoryTopkKernel* history_topk;
    HistoryTopkScratch* history_topk_scratch;
    HistoryRowsKernel* history_topk_rows;
    HistorySketchKernel* history_topk_sketch;
    const ItemTopkKernels& item_topk;
    ConvertKernel* convert;
    RowSumsKernel* row_sums;
};

// The levels that were built and that this machine can run, the plainest first.
std::vector<const Level*> supported_levels();

// The level in use: the one the environment variable RELLAX_ISA names, else the last supported one. It is chosen at
// the first call. Throws std::invalid_argument where RELLAX_ISA names a level that is unknown or cannot run here.
const Level& level();

}  // namespace rellax
