"""Gates under reentrant gradient checkpointing.

A reentrant checkpoint runs a backward pass of its own for each segment, so a gate that reached a layer
together with its graph would be back-propagated once per segment. Instead the layers get leaves, which gather
gradients in `.grad`, and the last node of the decoder's backward pass, an identity on the input embeddings,
hands the gathered gradients to the gate bank. Other checkpoints, and none, need nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_reentrant(layers: Iterable[Any]) -> bool:
    """Whether a forward pass through these decoder layers would checkpoint any of them reentrantly."""
    return torch.is_grad_enabled() and any(
        layer.gradient_checkpointing
        and layer.training
        and getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
        for layer in layers
    )


def enter(embeds: Tensor, gates: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The same input embeddings, requiring grad, and the same gates (M, B, r, r), one by one and as leaves.

    Without a gradient to its input a reentrant checkpoint gives none to anything in it.
    """
    if gates is not None and gates.requires_grad:
        leaves = tuple(gate.detach().requires_grad_() for gate in gates)
        return _GateEntry.apply(embeds, gates, leaves), leaves
    if not embeds.requires_grad:
        embeds = embeds.detach().requires_grad_()
    return embeds, None if gates is None else gates.unbind(0)


class _GateEntry(torch.autograd.Function):
    """Identity on the input embeddings whose backward gives the leaves' gradients to the gates."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor, gates: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        ctx.leaves = leaves
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gathered = [leaf.grad for leaf in ctx.leaves]
        if all(grad is None for grad in gathered):
            raise RuntimeError(
                "rellax: no layer gave its gates a gradient; under reentrant gradient checkpointing "
                'call loss.backward() without inputs, or checkpoint with {"use_reentrant": False}'
            )
        for leaf in ctx.leaves:
            leaf.grad = None
        pairs = zip(gathered, ctx.leaves, strict=True)
        gates = torch.stack([torch.zeros_like(leaf) if got is None else got for got, leaf in pairs])
        return grad, gates, None
