"""What users run today for a gated or plain low-rank update, and the frozen layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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


def plain_lora(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    """LoRA as PEFT runs it, with the adapter in x's dtype; it has no gate, and so does less."""
    return F.linear(x, weight) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


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
    y: Tensor = _AddmmChain.apply(x, weight, a.to(x.dtype), b.to(x.dtype), gate.to(x.dtype), scale)
    return y
