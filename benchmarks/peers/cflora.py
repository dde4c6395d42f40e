"""What users run today for a gated or plain low-rank update, and the frozen layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frozen_linear(x: Tensor, weight: Tensor, **_: object) -> Tensor:
    """The layer alone: what an overhead is measured against."""
    return F.linear(x, weight)


def published_cflora(
    x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float
) -> Tensor:
    """CFLoRA as published: the adapter runs in fp32, each product makes a tensor of its own."""
    h = x.float() @ a.t()
    return F.linear(x, weight) + (h @ gate @ b.t() * scale).to(x.dtype)


compiled_cflora = torch.compile(published_cflora, dynamic=False)
"""The same through Inductor."""


def narrow(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen factor in this dtype, cast once; the copy is kept with it."""
    copies: dict[torch.dtype, Tensor] = vars(factor).setdefault("copies", {})
    if dtype not in copies:
        copies[dtype] = factor.to(dtype)
    return copies[dtype]


def plain_lora(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    """LoRA written by hand as PEFT computes it, the adapter in x's dtype; no gate, so it does less."""
    return F.linear(x, weight) + F.linear(F.linear(x, narrow(a, x.dtype)), narrow(b, x.dtype)) * scale


class _AddmmChain(torch.autograd.Function):
    """CFLoRA by in-place addmm on torch's products, the way Unsloth does LoRA; h is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, gate: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b, gate)
        ctx.scale = scale
        y = F.linear(x, weight)
        z = (x @ a.t()) @ gate
        y.flatten(0, 1).addmm_(z.flatten(0, 1), b.t(), alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, gate = ctx.saved_tensors
        dz = (dy @ b).mul_(ctx.scale)
        dgate = (x @ a.t()).mT @ dz
        dx = dy @ weight
        dx.flatten(0, 1).addmm_((dz @ gate.mT).flatten(0, 1), a)
        return dx, None, None, None, dgate, None


def addmm_chain(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    a, b = narrow(a, x.dtype), narrow(b, x.dtype)
    y: Tensor = _AddmmChain.apply(x, weight, a, b, gate.to(x.dtype), scale)
    return y


def peft_lora(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    """PEFT's own layer as `get_peft_model` makes it: the adapter in fp32, also around a bf16 layer."""
    y: Tensor = _peft_layer(weight, a, b, scale, torch.float32)(x)
    return y


def peft_lora_narrow(
    x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float
) -> Tensor:
    """PEFT's own layer with the adapter in x's dtype, as with `autocast_adapter_dtype=False`."""
    y: Tensor = _peft_layer(weight, a, b, scale, x.dtype)(x)
    return y


def _peft_layer(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> nn.Module:
    """The layer over these tensors; it is kept with the weight."""
    layers: dict[torch.dtype, nn.Module] = vars(weight).setdefault("peft_layers", {})
    if dtype not in layers:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        rank, d_in = a.shape
        base = nn.Linear(d_in, len(b), bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        config = LoraConfig(r=rank, lora_alpha=rank * scale)
        layer = Linear(base, "default", config, r=rank, lora_alpha=rank * scale)
        layer.lora_A["default"].weight = nn.Parameter(a.to(dtype), requires_grad=False)
        layer.lora_B["default"].weight = nn.Parameter(b.to(dtype), requires_grad=False)
        layers[dtype] = layer
    return layers[dtype]


class _RowPasses(torch.autograd.Function):
    """What an update on a CPU cannot do without, in torch's vector code: x read, y read and written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight).add_(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return (dy @ weight).add_(dy), None


def row_passes(x: Tensor, weight: Tensor, **_: object) -> Tensor:
    """The floor of an update that is added to the product: y += x and dx += dy, for square weights."""
    y: Tensor = _RowPasses.apply(x, weight)
    return y
