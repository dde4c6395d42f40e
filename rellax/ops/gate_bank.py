"""``rellax::gate_bank``: the interaction matrices of all adapted projections from the instance embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rellax.ops import _gate_bank_cpp as cpp
from rellax.ops._check import bad, check_number, check_tensor, is_floating
from rellax.ops._register import operator
from rellax.reference import gate_bank as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_forward = operator(
    "gate_bank",
    reference.gate_bank_fwd,
    cpp=cpp.gate_bank_fwd,
    cpp_dtypes=_DTYPES,
    triton="rellax.kernels.gate_bank:gate_bank_fwd",
    triton_dtypes=_DTYPES,
)
_backward = operator(
    "gate_bank_backward",
    reference.gate_bank_bwd,
    cpp=cpp.gate_bank_bwd,
    cpp_dtypes=_DTYPES,
    triton="rellax.kernels.gate_bank:gate_bank_bwd",
    triton_dtypes=_DTYPES,
)


def gate_bank(
    u: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """G_m = reshape(W2_m GELU(W1_m LN_m(u) + b1_m) + b2_m) for all M projections at once (ReLLaX).

    Every projection has its own two-layer MLP and layer norm; GELU is the exact one (erf). The gates are fp32
    or wider whatever comes in, under autocast too; W2 = 0 and b2 = vec(I) give exactly I. Gradients: u and
    all parameters.

    Args:
        u: (B, d_u) instance embedding, the last hidden layer of the recommendation model; any floating dtype.
        ln_weight: (M, d_u), the layer norms' weights. All parameters share one floating dtype.
        ln_bias: (M, d_u), the layer norms' biases.
        w1: (M, 2r², d_u); tells r.
        b1: (M, 2r²).
        w2: (M, n, 2r²), with n = r² for full matrices or n = r for diagonal ones.
        b2: (M, n).
        eps: added to the variance of u; not negative.

    Returns:
        (M, B, r, r) in the widest dtype of the arguments, at least fp32.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    _check(u, ln_weight, ln_bias, w1, b1, w2, b2)
    check_number("eps", eps, "a finite number, at least 0", 0.0)
    u = u.to(torch.promote_types(u.dtype, w1.dtype))  # its dtype chooses the backend
    gate: Tensor = _forward(u, ln_weight, ln_bias, w1, b1, w2, b2, eps)
    return gate


@_forward.register_fake
def _forward_fake(u: Tensor, _ln_weight: Tensor, _ln_bias: Tensor, w1: Tensor, *_: Any) -> Tensor:
    r = _rank(w1)
    dtype = torch.promote_types(torch.promote_types(u.dtype, w1.dtype), torch.float32)
    return u.new_empty((w1.shape[0], u.shape[0], r, r), dtype=dtype)


@_backward.register_fake
def _backward_fake(_dgate: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    u, ln_weight, ln_bias, w1, b1, w2, _eps, need_u = rest
    du = u.new_empty(u.shape if need_u else (0,))
    parameters = (tensor.new_empty(tensor.shape) for tensor in (ln_weight, ln_bias, w1, b1, w2))
    return du, *parameters, w2.new_empty(w2.shape[:2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *arguments, _b2, ctx.eps = inputs
    ctx.save_for_backward(*arguments)


def _autograd(ctx: Any, dgate: Tensor) -> tuple[Tensor | None, ...]:
    need_u = ctx.needs_input_grad[0]
    du, *parameters = _backward(dgate, *ctx.saved_tensors, ctx.eps, need_u)
    return du if need_u else None, *parameters, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _rank(w1: Tensor) -> int:
    """The least r with 2r² >= hidden units; counted, as torch.compile follows no square root of a size."""
    r = 0
    while 2 * r * r < w1.shape[1]:
        r += 1
    return r


def _check(
    u: Tensor, ln_weight: Tensor, ln_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> None:
    if not is_floating(u) or u.dim() != 2:
        raise bad("u", "floating (B, d_u)", u)
    d_u = u.shape[1]
    check_tensor("w1", w1, (None, None, d_u), "(M, 2r², d_u)", u.device)
    M, hidden, _ = w1.shape
    r = _rank(w1)
    if r == 0 or hidden != 2 * r * r:
        raise bad("w1", "shape (M, 2r², d_u) for a whole number r", w1)
    check_tensor("w2", w2, (M, None, hidden), "(M, n, 2r²)", u.device, w1.dtype)
    if w2.shape[1] not in (r, r * r):
        raise bad("w2", f"shape (M, n, 2r²) with n = r² = {r * r} (full) or n = r = {r} (diagonal)", w2)
    n = w2.shape[1]
    for name, tensor, shape, meaning in (
        ("ln_weight", ln_weight, (M, d_u), "(M, d_u)"),
        ("ln_bias", ln_bias, (M, d_u), "(M, d_u)"),
        ("b1", b1, (M, hidden), "(M, 2r²)"),
        ("b2", b2, (M, n), "(M, n)"),
    ):
        check_tensor(name, tensor, shape, meaning, u.device, w1.dtype)
