"""``rellax._C``'s CFLoRA kernels as implementations of ``rellax::cflora_linear`` and its backward pass.

The products with W are torch's own; the kernels add the low-rank update to their results in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.ops._register import extension
from rellax.reference._numerics import column_hashes, keep_threshold

_COMPONENTS, _COLUMNS = 4, 32  # what csrc/cflora.h pads the rank and the columns to


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
    """As ``rellax.reference.cflora.cflora_fwd``, for fp32 and bf16."""
    rows = _rows(x)
    y = F.linear(x, weight, bias)
    h = torch.empty((rows.shape[0], lora_a.shape[0]))
    drop, _columns = _dropout(dropout, seed, rows.shape[1])
    down, up, offsets, gate = _packed(lora_a), _packed(lora_b.t()), _offsets(x, gate, cu_seqlens), _gate(gate)
    extension().cflora_forward(
        dtype=_name(x),
        r=lora_a.shape[0],
        d_from=rows.shape[1],
        d_to=weight.shape[0],
        from_=rows.data_ptr(),
        from_stride=rows.stride(0),
        down=down.data_ptr(),
        up=up.data_ptr(),
        gate=_address(gate),
        scale=scale,
        dropout=drop,
        to=y.data_ptr(),
        h=h.data_ptr(),
        offsets=offsets.data_ptr(),
        instances=len(offsets) - 1,
        threads=torch.get_num_threads(),
    )
    return y, h


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
    """As ``rellax.reference.cflora.cflora_bwd``, for fp32 and bf16."""
    need_x, need_gate, need_a, need_b = needs
    rows = _rows(dy)
    dx = dy @ weight if need_x else None
    dh = torch.empty_like(h) if need_a else None
    z = torch.empty_like(h) if need_b else None
    dgate = torch.empty(gate.shape) if need_gate and gate is not None else None
    drop, _columns = _dropout(dropout, seed, weight.shape[1])
    down, up, offsets, g = _packed(lora_b.t()), _packed(lora_a), _offsets(dy, gate, cu_seqlens), _gate(gate)
    extension().cflora_backward(
        dtype=_name(dy),
        r=lora_a.shape[0],
        d_from=rows.shape[1],
        d_to=weight.shape[1],
        from_=rows.data_ptr(),
        from_stride=rows.stride(0),
        down=down.data_ptr(),
        up=up.data_ptr(),
        gate=_address(g),
        scale=scale,
        dropout=drop,
        to=_address(dx),
        h=h.data_ptr(),
        dh=_address(dh),
        z=_address(z),
        dgate=_address(dgate),
        offsets=offsets.data_ptr(),
        instances=len(offsets) - 1,
        threads=torch.get_num_threads(),
    )
    da = None if dh is None or x is None else _outer(dh, _rows(x), drop).to(lora_a.dtype)
    db = None if z is None else _outer(z, rows, extension().Dropout()).t().to(lora_b.dtype)
    if dgate is not None and gate is not None:
        dgate = dgate.to(gate.dtype)
    dx, dgate, da, db = (dy.new_empty(0) if g is None else g.contiguous() for g in (dx, dgate, da, db))
    return dx, dgate, da, db


def _outer(left: Tensor, right: Tensor, dropout: Any) -> Tensor:
    """left (T, r)ᵀ drop(right (T, d)): (r, d) fp32."""
    (tokens, r), d = left.shape, right.shape[1]
    out = _packed(left.new_zeros((r, d)))
    extension().cflora_outer(
        dtype=_name(right),
        tokens=tokens,
        r=r,
        d=d,
        left=left.data_ptr(),
        right=right.data_ptr(),
        right_stride=right.stride(0),
        dropout=dropout,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out[:r, :d]


def _dropout(p: float, seed: Tensor | None, columns: int) -> tuple[Any, Tensor | None]:
    """What is dropped, and the hashes it points to."""
    if seed is None:
        return extension().Dropout(), None
    hashes = column_hashes(seed, _round_up(columns, _COLUMNS))
    drop = extension().Dropout(
        column=hashes.data_ptr(), seed=int(seed) & 0xFFFFFFFF, threshold=keep_threshold(p), factor=1 / (1 - p)
    )
    return drop, hashes


def _rows(x: Tensor) -> Tensor:
    """x as (T, d) with the elements of a row side by side; a copy only where it cannot be a view."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _packed(matrix: Tensor) -> Tensor:
    """An fp32 copy (r, d), padded with zeros to whole blocks."""
    r, d = matrix.shape
    shape = (_round_up(r, _COMPONENTS), _round_up(d, _COLUMNS))
    packed = matrix.new_zeros(shape, dtype=torch.float32)
    packed[:r, :d] = matrix
    return packed


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _offsets(tokens: Tensor, gate: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(B + 1,) int64: where each instance's tokens begin. Without gates all tokens are one instance."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    if gate is None:
        return torch.tensor([0, tokens.shape[:-1].numel()])
    return torch.arange(gate.shape[0] + 1) * tokens.shape[1]


def _gate(gate: Tensor | None) -> Tensor | None:
    return None if gate is None else gate.float().contiguous()


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
