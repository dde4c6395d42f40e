// The gate bank: M small two-layer perceptrons that read the same instance embeddings.
//
//     forward    x_m = x̂ ∘ v_m + c_m        a_m = x_m W1_mᵀ + b1_m        g_m = GELU(a_m)        flat_m = g_m W2_mᵀ + b2_m
//     backward   da = (dflat W2) ∘ GELU'(a)      dW2 = dflatᵀ g      db2 = Σ dflat      db1 = Σ da
//                dW1 = (daᵀ x̂) ∘ v + db1 ⊗ c     dv = Σ_h W1 ∘ (daᵀ x̂)     dc = db1 W1     dx̂ = Σ_m (da W1) ∘ v
//
// x̂ are the normalised rows of u. The backward pass computes a again. It gets dv and dc from W1 and daᵀ x̂, not from
// da W1: that product, a fifth of its arithmetic, is made only where the gradient of u is wanted.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace rellax {

// Plain pointers and sizes: what an ISA-compiled kernel may see. All memory is contiguous.
struct GateBank {
    Dtype dtype;          // of the parameters and their gradients: float32 or bfloat16
    int64_t projections;  // M
    int64_t instances;    // B
    int64_t d_u;
    int64_t hidden;       // 2r²
    int64_t outputs;      // n, r² or r
    const float* u;       // (B, d_u)
    float eps;
    const void* ln_weight;  // (M, d_u) v
    const void* ln_bias;    // (M, d_u) c
    const void* w1;         // (M, 2r², d_u)
    const void* b1;         // (M, 2r²)
    const void* w2;         // (M, n, 2r²)
};

struct GateBankGradients {
    const float* dflat;  // (M, B, n)
    float* du;           // (B, d_u), or null: not wanted
    void* dln_weight;    // as the parameters
    void* dln_bias;
    void* dw1;
    void* db1;
    void* dw2;
    void* db2;
};

constexpr int64_t kTile = 128;  // hidden units, outputs, and in the forward pass instances, taken together

static constexpr int64_t padded_embedding(int64_t d_u) { return (d_u + 15) / 16 * 16; }  // with zeros
static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A tile of weights or of their gradients, in floats.
static constexpr int64_t panel_size(const GateBank& bank) { return kTile * larger(kTile, padded_embedding(bank.d_u)); }
static constexpr int64_t forward_scratch(const GateBank& bank) {
    return kTile * (padded_embedding(bank.d_u) + kTile) + panel_size(bank);
}
static constexpr int64_t backward_scratch(const GateBank& bank) {
    const int64_t stride = padded_embedding(bank.d_u);
    return 2 * bank.instances * (stride + kTile) + panel_size(bank) + larger(kTile, bank.outputs) + 2 * stride;
}

// Instances [first, last), at most kTile, of one projection. `normed` (B, padded_embedding(d_u)) is x̂.
using GateBankForwardKernel = void(const GateBank& bank, const void* b2, float* flat, const float* normed,
                                   int64_t projection, int64_t first, int64_t last, float* scratch);

// All gradients of one projection. `dnormed`, shaped as `normed`, gains its (da W1) ∘ v, unless null.
using GateBankBackwardKernel = void(const GateBank& bank, const GateBankGradients& gradients, const float* normed,
                                    float* dnormed, int64_t projection, float* scratch);

// `flat` (M, B, n). No result depends on `threads`.
void gate_bank_forward(const GateBank& bank, const void* b2, float* flat, int threads);
void gate_bank_backward(const GateBank& bank, const GateBankGradients& gradients, int threads);

}  // namespace rellax
