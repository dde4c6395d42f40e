"""``rellax::cflora_linear``: a frozen linear layer with a low-rank update gated per instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rellax.ops import _cflora_cpp as cpp
from rellax.ops._check import bad, check_cu_seqlens, check_tensor
from rellax.ops._register import operator
from rellax.reference import cflora as reference

_CPP_DTYPES = (torch.float32, torch.bfloat16)
_forward = operator("cflora_linear", reference.cflora_fwd, cpp=cpp.cflora_fwd, cpp_dtypes=_CPP_DTYPES)
_backward = operator(
    "cflora_linear_backward", reference.cflora_bwd, cpp=cpp.cflora_bwd, cpp_dtypes=_CPP_DTYPES
)


def cflora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    scale: float,
    *,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scale · (drop(x) Aᵀ G_b) Bᵀ, with an r x r matrix G_b per instance (ReLLaX's CFLoRA).

    Gradients: x and gate always, lora_a and lora_b where they require them; weight and bias are frozen. With
    A and B frozen nothing of size T x d_in is kept for the backward pass. Under autocast x, weight and bias
    are cast as ``torch.nn.functional.linear`` would.

    Args:
        x: (B, L, d_in), or packed (T, d_in) with `cu_seqlens`; fp32, fp64, bf16 or fp16.
        weight: (d_out, d_in) in x's dtype.
        bias: (d_out,) in x's dtype, or None.
        lora_a: (r, d_in), the down components; any floating dtype.
        lora_b: (d_out, r), the up components; any floating dtype.
        gate: (B, r, r), on the right of a row vector; None is the identity: plain LoRA.
        scale: alpha / r.
        cu_seqlens: (B + 1,) int32, the offsets of the instances in a packed x.
        dropout: probability of dropping an element of x on its way into A, in [0, 1).
        seed: () int64 on x's device; drawn from torch's generator where it is needed and not given.

    Returns:
        (B, L, d_out) or (T, d_out), in x's dtype.

    Raises:
        InputError: a shape, dtype or device does not fit, or a frozen tensor requires a gradient.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, bias, lora_a, lora_b, gate, cu_seqlens, dropout, seed)
    if dropout and seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    y, _ = _forward(x, weight, bias, lora_a, lora_b, gate, scale, cu_seqlens, dropout, seed)
    return y


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor, _bias: Tensor | None, lora_a: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(
        (x.shape[:-1].numel(), lora_a.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0])), h


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    _x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_gate, need_a, need_b = rest[-1]
    dx = dy.new_empty((*dy.shape[:-1], weight.shape[1]) if need_x else (0,))
    dgate = gate.new_empty(gate.shape) if need_gate and gate is not None else dy.new_empty(0)
    da = lora_a.new_empty(lora_a.shape) if need_a else dy.new_empty(0)
    db = lora_b.new_empty(lora_b.shape) if need_b else dy.new_empty(0)
    return dx, dgate, da, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, gate, ctx.scale, cu_seqlens, ctx.dropout, seed = inputs
    _, h = output
    kept_x = x if ctx.needs_input_grad[3] else None
    ctx.save_for_backward(kept_x, weight, lora_a, lora_b, gate, h, cu_seqlens, seed)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, weight, lora_a, lora_b, gate, h, cu_seqlens, seed = ctx.saved_tensors
    need_x, _, _, need_a, need_b, need_gate, *_ = ctx.needs_input_grad
    needs = [need_x, need_gate, need_a, need_b]
    gradients = _backward(
        dy, x, weight, lora_a, lora_b, gate, h, ctx.scale, cu_seqlens, ctx.dropout, seed, needs
    )
    dx, dgate, da, db = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return dx, None, None, da, db, dgate, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    if x.dim() != (3 if cu_seqlens is None else 2) or not x.is_floating_point():
        raise bad("x", "floating (B, L, d_in), or packed (T, d_in) with cu_seqlens", x)
    device, d_in = x.device, x.shape[-1]
    check_tensor("weight", weight, (None, d_in), "(d_out, d_in)", device, x.dtype)
    d_out = weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, (d_out,), "(d_out,)", device, x.dtype)
    check_tensor("lora_a", lora_a, (None, d_in), "(r, d_in)", device)
    r = lora_a.shape[0]
    check_tensor("lora_b", lora_b, (d_out, r), "(d_out, r)", device)
    instances = x.shape[0] if cu_seqlens is None else None
    if gate is not None:
        check_tensor("gate", gate, (instances, r, r), "(B, r, r)", device)
        instances = gate.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, instances, x.shape[0], device)
    if not 0.0 <= dropout < 1.0:
        raise bad("dropout", "a probability in [0, 1)", dropout)
    if seed is not None:
        check_tensor("seed", seed, (), "()", device, torch.int64)
    if torch.is_grad_enabled():
        for name, frozen in (("weight", weight), ("bias", bias)):
            if frozen is not None and frozen.requires_grad:
                raise bad(name, "a frozen tensor (requires_grad False)", "one that requires a gradient")
