#include "gate_bank.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace rellax {
namespace {

// Multiplications for which a further thread is worth its start; loading a weight takes as long as kLoad of them.
constexpr int64_t kThreadWork = int64_t{1} << 20;
constexpr int64_t kLoad = 16;

// dx̂ is added up in at most this many shares, so that it is the same for any number of threads.
constexpr int64_t kShares = 64;

int64_t work_of(const GateBank& bank) {
    return bank.projections * bank.hidden * (bank.d_u + bank.outputs) * (bank.instances + kLoad);
}

struct Normalised {
    std::vector<float> rows;  // (B, padded_embedding(d_u)) x̂
    std::vector<float> rstd;  // (B,) 1 / standard deviation
};

Normalised normalise(const GateBank& bank) {
    const int64_t stride = padded_embedding(bank.d_u);
    Normalised normed{std::vector<float>(bank.instances * stride), std::vector<float>(bank.instances)};
    for (int64_t b = 0; b < bank.instances; ++b) {
        const float* u = bank.u + b * bank.d_u;
        double sum = 0, squares = 0;
        for (int64_t d = 0; d < bank.d_u; ++d) sum += u[d];
        const double mean = sum / bank.d_u;
        for (int64_t d = 0; d < bank.d_u; ++d) squares += (u[d] - mean) * (u[d] - mean);
        const double rstd = 1 / std::sqrt(squares / bank.d_u + bank.eps);
        for (int64_t d = 0; d < bank.d_u; ++d) normed.rows[b * stride + d] = (u[d] - mean) * rstd;
        normed.rstd[b] = rstd;
    }
    return normed;
}

// du from dx̂, the sum of `shares`.
void normalise_backward(const GateBank& bank, const Normalised& normed, const std::vector<float>& shares, float* du) {
    const int64_t stride = padded_embedding(bank.d_u), size = bank.instances * stride;
    std::vector<float> dnormed(stride);
    for (int64_t b = 0; b < bank.instances; ++b) {
        std::fill(dnormed.begin(), dnormed.end(), 0.0f);
        for (size_t share = b * stride; share < shares.size(); share += size) {
            for (int64_t d = 0; d < stride; ++d) dnormed[d] += shares[share + d];
        }
        const float* x = normed.rows.data() + b * stride;
        double sum = 0, along = 0;
        for (int64_t d = 0; d < bank.d_u; ++d) {
            sum += dnormed[d];
            along += double{dnormed[d]} * x[d];
        }
        for (int64_t d = 0; d < bank.d_u; ++d) {
            du[b * bank.d_u + d] = normed.rstd[b] * (dnormed[d] - (sum + along * x[d]) / bank.d_u);
        }
    }
}

}  // namespace

void gate_bank_forward(const GateBank& bank, const void* b2, float* flat, int threads) {
    GateBankForwardKernel* const kernel = level().gate_bank_forward;
    const Normalised normed = normalise(bank);
    const int64_t tiles = (bank.instances + kTile - 1) / kTile;
    parallel_for(bank.projections * tiles, threads_for(work_of(bank), kThreadWork, threads), [&](int64_t index) {
        const int64_t first = index % tiles * kTile, last = std::min(first + kTile, bank.instances);
        const Scratch scratch(forward_scratch(bank));
        kernel(bank, b2, flat, normed.rows.data(), index / tiles, first, last, scratch.data());
    });
}

void gate_bank_backward(const GateBank& bank, const GateBankGradients& gradients, int threads) {
    GateBankBackwardKernel* const kernel = level().gate_bank_backward;
    const Normalised normed = normalise(bank);
    const int64_t count = std::min(bank.projections, kShares), size = static_cast<int64_t>(normed.rows.size());
    std::vector<float> shares(gradients.du == nullptr ? 0 : count * size);
    parallel_for(count, threads_for(work_of(bank), kThreadWork, threads), [&](int64_t share) {
        const Scratch scratch(backward_scratch(bank));
        float* dnormed = gradients.du == nullptr ? nullptr : shares.data() + share * size;
        for (int64_t m = share * bank.projections / count; m < (share + 1) * bank.projections / count; ++m) {
            kernel(bank, gradients, normed.rows.data(), dnormed, m, scratch.data());
        }
    });
    if (gradients.du != nullptr) normalise_backward(bank, normed, shares, gradients.du);
}

}  // namespace rellax
