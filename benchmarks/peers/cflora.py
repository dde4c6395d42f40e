"""What users run today for a gated or plain low-rank update: eager PyTorch, from the published formulas."""

from __future__ import annotations

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


def plain_lora(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    """LoRA as PEFT runs it, with the adapter in x's dtype; it has no gate, and so does less."""
    return F.linear(x, weight) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale
