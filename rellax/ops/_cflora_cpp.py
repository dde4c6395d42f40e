"""``rellax._C``'s CFLoRA kernels as implementations of ``rellax::cflora_linear`` and its backward pass.

The kernels begin y and dx with the low-rank updates; torch's own products with W are added on top, in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.ops._register import extension
from rellax.reference._numerics import column_hashes, keep_threshold

_COMPONENTS, _BLOCK = 4, 32  # kComponents and kBlock of csrc/cflora.h


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
    """As ``rellax.reference.cflora.cflora_fwd``, for fp32 and bf16."""
    rows = _rows(x)
    outputs = [rows.new_empty((rows.shape[0], b.shape[0])) for b in lora_b]
    added = [None if b is None else b.contiguous() for b in bias] if weight else [_rows(y) for y in base]
    h = torch.empty((rows.shape[0], len(lora_a) * lora_a[0].shape[0]))
    a = _shrinking(torch.cat(list(lora_a)), x.dtype)
    b = [_expanding(matrix.t(), x.dtype) for matrix in lora_b]
    update = _Set(rows, a, outputs, added, b, gate, scale, (dropout, seed), h)
    extension().cflora_forward(update.task, **_tokens(x, gate, cu_seqlens))
    for y, w in zip(outputs, weight, strict=bool(weight)):
        y.addmm_(rows, w.t())
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs], h


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
    """As ``rellax.reference.cflora.cflora_bwd``, for fp32 and bf16."""
    need_x, need_gate, need_a, need_b = needs
    dtype, d_in = dy[0].dtype, lora_a[0].shape[1]
    rows = [_rows(dy_i) for dy_i in dy]
    dx = rows[0].new_empty((h.shape[0] if need_x else 0, d_in))
    dh = torch.empty_like(h) if need_a else None
    z = torch.empty_like(h) if need_b else None
    dgate = [torch.empty(g.shape) for g in gate] if need_gate else []

    a = _expanding(torch.cat(list(lora_a)), dtype)
    b = [_shrinking(matrix.t(), dtype) for matrix in lora_b]
    update = _Set(dx, a, rows, [None] * len(dy), b, gate, scale, (dropout, seed), h)
    extension().cflora_backward(
        update.task,
        dh=_address(dh),
        z=_address(z),
        dgate=[g.data_ptr() for g in dgate],
        **_tokens(dy[0], gate, cu_seqlens),
    )
    if need_x:
        for dy_i, w in zip(rows, weight, strict=bool(weight)):
            dx.addmm_(dy_i, w)
        dx = dx.view(*dy[0].shape[:-1], d_in)
    da, db = [], []
    if dh is not None and x is not None:
        for part, a_i in zip(_outer(dh, _rows(x), update.dropout).chunk(len(dy)), lora_a, strict=True):
            da.append(part.to(a_i.dtype, copy=True, memory_format=torch.contiguous_format))
    if z is not None:
        keep = extension().Dropout()
        for z_i, rows_i, b_i in zip(z.chunk(len(dy), 1), rows, lora_b, strict=True):
            db.append(_outer(z_i, rows_i, keep).t().to(b_i.dtype).contiguous())
    dgate = [d.to(g.dtype) for d, g in zip(dgate, gate if need_gate else [], strict=True)]
    return dx if need_x else dy[0].new_empty(0), dgate, da, db


class _Set:
    """A set of layers as the extension takes it, and the tensors it points to."""

    def __init__(
        self,
        x: Tensor,
        a: Tensor,
        rows: Sequence[Tensor],
        added: Sequence[Tensor | None],
        b: Sequence[Tensor],
        gate: Sequence[Tensor],
        scale: float,
        dropout: tuple[float, Tensor | None],
        h: Tensor,
    ) -> None:
        gate = [g.float().contiguous() for g in gate]
        self.dropout, hashes = _dropout(*dropout, x.shape[1])
        self._kept_alive = (x, a, *rows, *added, *b, *gate, hashes, h)
        self.task = extension().Cflora(
            dtype=str(x.dtype).removeprefix("torch."),
            r=h.shape[1] // len(rows),
            d_in=x.shape[1],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            a=a.data_ptr(),
            d_out=[row.shape[1] for row in rows],
            rows=[row.data_ptr() for row in rows],
            strides=[row.stride(0) for row in rows],
            added=[_address(part) for part in added],
            added_strides=[part.stride(0) if part is not None and part.dim() == 2 else 0 for part in added],
            b=[matrix.data_ptr() for matrix in b],
            gate=[g.data_ptr() for g in gate],
            scale=scale,
            dropout=self.dropout,
            h=h.data_ptr(),
        )


def _outer(left: Tensor, right: Tensor, dropout: Any) -> Tensor:
    """left (T, c)ᵀ drop(right (T, d)): (c, d) fp32."""
    (tokens, components), d = left.shape, right.shape[1]
    out = left.new_empty((_round_up(components, _COMPONENTS), _round_up(d, _BLOCK)))
    if tokens == 0:
        out.zero_()
    extension().cflora_outer(
        dtype=str(right.dtype).removeprefix("torch."),
        tokens=tokens,
        components=components,
        d=d,
        left=left.data_ptr(),
        left_stride=left.stride(0),
        right=right.data_ptr(),
        right_stride=right.stride(0),
        dropout=dropout,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out[:components, :d]


def _dropout(p: float, seed: Tensor | None, columns: int) -> tuple[Any, Tensor | None]:
    """What is dropped, and the hashes it points to."""
    if seed is None:
        return extension().Dropout(), None
    hashes = column_hashes(seed, _round_up(columns, _BLOCK))
    drop = extension().Dropout(
        column=hashes.data_ptr(), seed=int(seed) & 0xFFFFFFFF, threshold=keep_threshold(p), factor=1 / (1 - p)
    )
    return drop, hashes


def _rows(x: Tensor) -> Tensor:
    """x as (T, d) with the elements of a row side by side; a copy only where it cannot be a view."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _shrinking(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Components (c, d) in the form for shrinking: see csrc/cflora.h."""
    blocks = _padded(matrix, dtype).unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _COMPONENTS))
    return blocks.transpose(1, 2).contiguous()


def _expanding(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Components (c, d) in the form for expanding: see csrc/cflora.h."""
    group = 2 if dtype == torch.bfloat16 else 1
    blocks = _padded(matrix, dtype).unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, group))
    return blocks.permute(2, 0, 3, 1).contiguous()


def _padded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix` with zeros up to whole blocks."""
    c, d = matrix.shape
    missing = (0, -d % _BLOCK, 0, -c % _COMPONENTS)
    return F.pad(matrix.to(dtype), missing) if any(missing) else matrix.to(dtype)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _tokens(rows: Tensor, gate: Sequence[Tensor], cu_seqlens: Tensor | None) -> dict[str, Any]:
    """Where each instance's tokens begin; without gates all tokens are one instance."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
    elif gate:
        offsets = [b * rows.shape[1] for b in range(rows.shape[0] + 1)]
    else:
        offsets = [0, rows.shape[:-1].numel()]
    return {"offsets": offsets, "threads": torch.get_num_threads()}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
