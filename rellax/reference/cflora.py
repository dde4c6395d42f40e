"""CFLoRA in plain PyTorch: the specification of ``rellax::cflora_linear``.

For each of the n layers that read x, with A, B, G, W, bias of its own and one mask for all of them:

    h = c · keep(x) Aᵀ        z = s · h G_b                   y = x Wᵀ + bias + z Bᵀ, or y = base + z Bᵀ

    dz = s · dy B             dG_b = Σ_{t in b} h_tᵀ dz_t     dh = c · dz G_bᵀ
    dx = Σ dy W + keep(dh A)  dA = dhᵀ keep(x)                dB = dyᵀ z

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
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    base: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    gate: Sequence[Tensor],
    scale: float,
    cu_seqlens: Tensor | None,
    tiles: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Each layer's y (…, d_out) in x's dtype, and h (T, n r) in fp32 for the backward pass.

    Either `weight` and `bias` are given, or `base`, the layers' own outputs. No `gate` is the identity.
    """
    rows = x.flatten(0, -2)
    h = F.linear(_keep(rows, dropout, seed), torch.cat(list(lora_a)).to(x.dtype))
    h = h.to(accumulation_dtype(x.dtype)) / (1 - dropout)
    outputs = []
    for i, (h_i, b_i) in enumerate(zip(h.chunk(len(lora_a), 1), lora_b, strict=True)):
        z = scale * _apply_gate(h_i, gate[i] if gate else None, cu_seqlens)
        y = x.new_empty((*x.shape[:-1], b_i.shape[0]))
        product = F.linear(rows, weight[i], bias[i]) if weight else base[i].flatten(0, -2)
        torch.addmm(product, z.to(x.dtype), b_i.to(x.dtype).t(), out=y.flatten(0, -2))
        outputs.append(y)
    return outputs, h


def cflora_bwd(
    dy: Sequence[Tensor],
    x: Tensor | None,
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    gate: Sequence[Tensor],
    h: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    tiles: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(dx, dG, dA, dB), the last three per layer; `needs` tells which are wanted, the others come back empty.

    Without `weight` dx is the low-rank update's alone. Only dA reads x.
    """
    need_x, need_gate, need_a, need_b = needs
    dtype = dy[0].dtype
    dx = dy[0].new_empty(0)
    dgates, das, dbs, dhs = [], [], [], []
    for i, h_i in enumerate(h.chunk(len(dy), 1)):
        rows, gate_i = dy[i].flatten(0, -2), gate[i] if gate else None
        dz = scale * (rows @ lora_b[i].to(dtype)).to(h.dtype)
        if need_gate and gate_i is not None:
            dgates.append(_gate_gradient(h_i, dz, gate_i, cu_seqlens))
        dh = _apply_gate(dz, None if gate_i is None else gate_i.mT, cu_seqlens) / (1 - dropout)
        dhs.append(dh.to(dtype))
        if need_b:
            z = scale * _apply_gate(h_i, gate_i, cu_seqlens)
            dbs.append((rows.t() @ z.to(dtype)).to(lora_b[i].dtype))
    if need_x:
        dx = _keep(torch.cat(dhs, 1) @ torch.cat(list(lora_a)).to(dtype), dropout, seed)
        for dy_i, weight_i in zip(dy, weight, strict=bool(weight)):
            dx.addmm_(dy_i.flatten(0, -2), weight_i)
        dx = dx.view(*dy[0].shape[:-1], lora_a[0].shape[1])
    if need_a:
        assert x is not None
        kept = _keep(x.flatten(0, -2), dropout, seed)
        das = [(dh.t() @ kept).to(a.dtype) for dh, a in zip(dhs, lora_a, strict=True)]
    return dx, dgates, das, dbs


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
    dgate = h.new_empty(gate.shape)
    lengths = cu_seqlens.diff().tolist()
    for dgate_b, h_b, dz_b in zip(dgate, h.split(lengths), dz.split(lengths), strict=True):
        torch.mm(h_b.t(), dz_b, out=dgate_b)
    return dgate.to(gate.dtype)


def _padded(h: Tensor, instances: int) -> Tensor:
    """(T, r) as (B, L, r)."""
    return h.unflatten(0, (instances, h.shape[0] // max(instances, 1)))


def _keep(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """x with the elements that dropout drops set to zero."""
    if not dropout:
        return x
    assert seed is not None
    rows, columns = x.shape
    return x * keep_mask(seed, rows, columns, dropout)
