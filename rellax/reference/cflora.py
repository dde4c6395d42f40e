"""CFLoRA in plain PyTorch: the specification of ``rellax::cflora_linear``.

    h = c · keep(x) Aᵀ        z = s · h G_b                   y = x Wᵀ + bias + z Bᵀ

    dz = s · dy B             dG_b = Σ_{t in b} h_tᵀ dz_t     dh = c · dz G_bᵀ
    dx = dy W + keep(dh A)    dA = dhᵀ keep(x)                dB = dyᵀ z

keep zeroes what dropout drops, and c = 1 / (1 - dropout). Products of size d run in x's dtype; h, z and G are
multiplied and scaled in fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.reference._numerics import accumulation_dtype, keep_mask


def cflora_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (…, d_out) in x's dtype, and h (T, r) in fp32 for the backward pass."""
    rows = x.flatten(0, -2)
    h = F.linear(_keep(rows, dropout, seed), lora_a.to(x.dtype))
    h = h.to(accumulation_dtype(x.dtype)) / (1 - dropout)
    z = scale * _apply_gate(h, gate, cu_seqlens)
    y = F.linear(rows, weight, bias)
    y.addmm_(z.to(x.dtype), lora_b.to(x.dtype).t())
    return y.view(*x.shape[:-1], weight.shape[0]), h


def cflora_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dG, dA, dB); `needs` tells which are wanted, the others come back empty. Only dA reads x."""
    need_x, need_gate, need_a, need_b = needs
    rows = dy.flatten(0, -2)
    dx, dgate, da, db = (dy.new_empty(0) for _ in range(4))
    dz = scale * (rows @ lora_b.to(dy.dtype)).to(h.dtype)
    if need_gate:
        assert gate is not None
        dgate = _gate_gradient(h, dz, gate, cu_seqlens)
    if need_x or need_a:
        dh = _apply_gate(dz, None if gate is None else gate.mT, cu_seqlens) / (1 - dropout)
        dh = dh.to(dy.dtype)
    if need_x:
        dx = rows @ weight
        if dropout:
            dx += _keep(dh @ lora_a.to(dy.dtype), dropout, seed)
        else:
            dx.addmm_(dh, lora_a.to(dy.dtype))
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    if need_a:
        assert x is not None
        da = (dh.t() @ _keep(x.flatten(0, -2), dropout, seed)).to(lora_a.dtype)
    if need_b:
        z = scale * _apply_gate(h, gate, cu_seqlens)
        db = (rows.t() @ z.to(dy.dtype)).to(lora_b.dtype)
    return dx, dgate, da, db


def _apply_gate(h: Tensor, gate: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """h_t G_b for each token t of instance b: (T, r)."""
    if gate is None:
        return h
    gate = gate.to(h.dtype)
    if cu_seqlens is None:
        return (_padded(h, gate.shape[0]) @ gate).flatten(0, 1)
    z = torch.empty_like(h)
    lengths = cu_seqlens.diff().tolist()
    for z_b, h_b, gate_b in zip(z.split(lengths), h.split(lengths), gate, strict=True):
        torch.mm(h_b, gate_b, out=z_b)
    return z


def _gate_gradient(h: Tensor, dz: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Σ_{t in b} h_tᵀ dz_t: (B, r, r)."""
    if cu_seqlens is None:
        return (_padded(h, gate.shape[0]).mT @ _padded(dz, gate.shape[0])).to(gate.dtype)
    dgate = torch.empty_like(gate, dtype=h.dtype)
    lengths = cu_seqlens.diff().tolist()
    for dgate_b, h_b, dz_b in zip(dgate, h.split(lengths), dz.split(lengths), strict=True):
        torch.mm(h_b.t(), dz_b, out=dgate_b)
    return dgate.to(gate.dtype)


def _padded(h: Tensor, instances: int) -> Tensor:
    """(T, r) as (B, L, r)."""
    return h.view(instances, h.shape[0] // max(instances, 1), h.shape[1])


def _keep(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """x with the elements that dropout drops set to zero."""
    if not dropout:
        return x
    assert seed is not None
    rows, columns = x.shape
    return x * keep_mask(seed, rows, columns, dropout)
