"""A frozen linear layer with a low-rank update that is gated per instance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rellax.ops._check import check_count, check_number, check_positive
from rellax.ops.cflora import cflora_linears, cflora_update


class CFLoRA:
    """The forward pass of a CFLoRA layer, whatever module stores its tensors.

    A class that mixes it in provides `weight` (d_out, d_in), `bias` (d_out,) or None, `lora_a` (r, d_in),
    `lora_b` (d_out, r), `scale`, `dropout` and `training`, as attributes or properties.
    """

    def forward(
        self: Any, x: Tensor, gate: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """y = x Wᵀ + bias + scale · (drop(x) Aᵀ G_b) Bᵀ.

        Args:
            x: (B, L, d_in), or packed (T, d_in) with `cu_seqlens`.
            gate: (B, r, r), one interaction matrix per instance; None is the identity: plain LoRA.
            cu_seqlens: (B + 1,) int32, the offsets of the instances in a packed x.

        Returns:
            (B, L, d_out) or (T, d_out).
        """
        (y,) = forward_together([self], x, None if gate is None else [gate], cu_seqlens=cu_seqlens)
        return y


class CFLoRAUpdate(CFLoRA):
    """`CFLoRA` on a layer whose weight is out of reach, as if quantised: its own forward pass and an update.

    A class that mixes it in provides `base(x)`, the layer's own forward pass, instead of `weight` and `bias`.
    """


def forward_together(
    layers: Sequence[Any],
    x: Tensor,
    gates: Sequence[Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of CFLoRA layers that all read x, for which x is read once.

    Args:
        layers: modules with `CFLoRA`'s attributes, of one scale, dropout, training mode and rank; or one
            `CFLoRAUpdate`.
        x: (B, L, d_in), or packed (T, d_in) with `cu_seqlens`.
        gates: (B, r, r) for each layer; None: identities.
        cu_seqlens, tiles: as in `rellax.ops.cflora_linear`.
    """
    first, scale = layers[0], layers[0].scale
    options: dict[str, Any] = {
        "cu_seqlens": cu_seqlens,
        "tiles": tiles,
        "dropout": first.dropout if first.training else 0.0,
    }
    if isinstance(layers[0], CFLoRAUpdate):  # alone: its product is its own
        gate = None if gates is None else gates[0]
        return (cflora_update(first.base(x), x, first.lora_a, first.lora_b, gate, scale, **options),)
    return cflora_linears(
        x,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        [layer.lora_a for layer in layers],
        [layer.lora_b for layer in layers],
        gates,
        scale,
        **options,
    )


def check_lora(r: int, alpha: float, dropout: float) -> None:
    """Raise unless a low-rank update can have this rank, alpha and dropout."""
    check_count("r", r)
    check_positive("alpha", alpha)
    check_number("dropout", dropout, "a probability in [0, 1)", 0.0, below=1.0)


class CFLoRALinear(CFLoRA, nn.Linear):
    """`nn.Linear` with frozen weight and bias, and the parameters `lora_a` (r, d_in) and `lora_b` (d_out, r).

    lora_a starts as Kaiming uniform, lora_b as zero, so the layer starts as the linear layer it extends. Both
    are at least fp32: the small numbers of a low-rank update are lost in half precision.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank, at least 1.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an element on its way into A, in [0, 1); in training mode only.

    Raises:
        InputError: a size or a number is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("in_features", in_features, 0)
        check_count("out_features", out_features, 0)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.requires_grad_(False)
        self.add_lora(r, alpha, dropout)

    def add_lora(self, r: int, alpha: float, dropout: float) -> None:
        """Add the low-rank parameters to a linear layer that has none."""
        check_lora(r, alpha, dropout)
        r = int(r)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        place: dict[str, Any] = {"device": self.weight.device, "dtype": dtype}
        self.lora_a = nn.Parameter(torch.empty(r, self.in_features, **place))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, r, **place))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale = float(alpha) / r
        self.dropout = float(dropout)

    def remove_lora(self) -> None:
        """Take away what `add_lora` added, all of it or a part."""
        for name in ("lora_a", "lora_b"):
            self._parameters.pop(name, None)
        for name in ("scale", "dropout"):
            vars(self).pop(name, None)

    def extra_repr(self) -> str:
        r = self.lora_a.shape[0]
        return f"{super().extra_repr()}, r={r}, scale={self.scale:g}, dropout={self.dropout:g}"
