"""The gate bank in plain PyTorch: the specification of ``rellax::gate_bank``.

    x̂ = (u - mean u) / sqrt(var u + eps)        x_m = x̂ ⊙ v_m + c_m
    a_m = x_m W1_mᵀ + b1_m        g_m = GELU(a_m) W2_mᵀ + b2_m        G_m = reshape(g_m), or diag(g_m)

v and c are the layer norms' weights and biases: x̂ is the same for all M projections. Everything is computed
in fp32 (fp64 where an argument is fp64). The backward pass computes x̂, x_m and a_m again, at the cost of one
product: nothing but the arguments has to be kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.reference._numerics import accumulation_dtype


def gate_bank_fwd(
    u: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
) -> Tensor:
    """G (M, B, r, r) in fp32 or fp64."""
    dtype = accumulation_dtype(torch.promote_types(u.dtype, w1.dtype))
    normed, _ = _normalise(u.to(dtype), eps)
    hidden = _linear(_affine(normed, ln_weight, ln_bias), w1, b1)
    flat = _linear(F.gelu(hidden), w2, b2)
    r = math.isqrt(w1.shape[1] // 2)
    # No view: those that an operator makes may not be changed in place.
    return flat.unflatten(-1, (r, r)).clone() if flat.shape[-1] == r * r else torch.diag_embed(flat)


def gate_bank_bwd(
    dgate: Tensor,
    u: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    eps: float,
    need_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, dv, dc, dW1, db1, dW2, db2), each in its argument's dtype; du comes back empty unless `need_u`."""
    normed, rstd = _normalise(u.to(dgate.dtype), eps)
    x = _affine(normed, ln_weight, ln_bias)
    hidden = _linear(x, w1, b1)

    full = w2.shape[1] == dgate.shape[-1] ** 2
    dflat = dgate.flatten(2) if full else dgate.diagonal(dim1=-2, dim2=-1)
    dw2 = dflat.mT @ F.gelu(hidden)
    dhidden = torch.ops.aten.gelu_backward(dflat @ w2.to(dgate.dtype), hidden)
    dw1 = dhidden.mT @ x
    dx = dhidden @ w1.to(dgate.dtype)

    du = u.new_empty(0)
    if need_u:
        dnormed = (dx * ln_weight[:, None]).sum(0)
        projected = (dnormed * normed).mean(-1, keepdim=True)
        du = (rstd * (dnormed - dnormed.mean(-1, keepdim=True) - normed * projected)).to(u.dtype)
    dln_weight, dln_bias, dw1, db1, dw2, db2 = (
        gradient.to(w1.dtype)
        for gradient in ((dx * normed).sum(1), dx.sum(1), dw1, dhidden.sum(1), dw2, dflat.sum(1))
    )
    return du, dln_weight, dln_bias, dw1, db1, dw2, db2


def _normalise(u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x̂, 1 / standard deviation) of the rows of u."""
    centred = u - u.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _affine(normed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x̂ ⊙ v_m + c_m: (M, B, d_u)."""
    return normed * weight.to(normed.dtype)[:, None] + bias.to(normed.dtype)[:, None]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x_m W_mᵀ + b_m for all m in one product: (M, B, d) with (M, n, d) and (M, n)."""
    return torch.baddbmm(bias.to(x.dtype)[:, None], x, weight.to(x.dtype).mT)
