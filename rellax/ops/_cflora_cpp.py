"""``rellax._C``'s CFLoRA kernels as implementations of ``rellax::cflora_linear`` and its backward pass.

torch's own products with W come first; the kernels add the low-rank updates to them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rellax.kernels._host import cdiv, rows_of
from rellax.ops._check import dtype_name
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
    """As ``rellax.reference.cflora.cflora_fwd``, for fp32 and bf16.

    All is prepared before the products, which leave little of the interpreter's in the caches.
    """
    rows = rows_of(x)
    h = x.new_empty((rows.shape[0], len(lora_a) * lora_a[0].shape[0]), dtype=torch.float32)
    outputs = [x.new_empty((*x.shape[:-1], b.shape[0])) for b in lora_b]
    written = [rows_of(y) for y in outputs]
    bases = written if weight else [rows_of(y) for y in base]
    update = _Set(rows, False, written, bases, lora_a, lora_b, gate, scale, (dropout, seed), h)
    tokens = _tokens(x, gate, cu_seqlens)
    for y, w, b in zip(written, weight, bias, strict=bool(weight)):
        torch.mm(rows, w.t(), out=y) if b is None else torch.addmm(b, rows, w.t(), out=y)
    extension().cflora_forward(update.task, **tokens)
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
    """As ``rellax.reference.cflora.cflora_bwd``, for fp32 and bf16."""
    need_x, need_gate, need_a, need_b = needs
    d_in, rows = lora_a[0].shape[1], [rows_of(dy_i) for dy_i in dy]
    dx = rows[0].new_empty((h.shape[0] if need_x else 0, d_in))
    dh = torch.empty_like(h) if need_a else None
    z = torch.empty_like(h) if need_b else None
    dgate = [g.new_empty(g.shape, dtype=torch.float32) for g in gate] if need_gate else []
    nothing: list[Tensor | None] = [None] * len(dy)
    update = _Set(dx, bool(weight), rows, nothing, lora_a, lora_b, gate, scale, (dropout, seed), h)
    tokens = _tokens(dy[0], gate, cu_seqlens)
    if need_x:
        for i, (dy_i, w) in enumerate(zip(rows, weight, strict=bool(weight))):
            dx.addmm_(dy_i, w, beta=min(i, 1))
    extension().cflora_backward(
        update.task, dh=_address(dh), z=_address(z), dgate=[g.data_ptr() for g in dgate], **tokens
    )
    da, db = [], []
    if dh is not None and x is not None:
        for part, a_i in zip(_outer(dh, rows_of(x), update.dropout).chunk(len(dy)), lora_a, strict=True):
            da.append(part.to(a_i.dtype, copy=True, memory_format=torch.contiguous_format))
    if z is not None:
        keep = extension().Dropout()
        for z_i, rows_i, b_i in zip(z.chunk(len(dy), 1), rows, lora_b, strict=True):
            db.append(_outer(z_i, rows_i, keep).t().to(b_i.dtype).contiguous())
    dgate = [d.to(g.dtype) for d, g in zip(dgate, gate if need_gate else [], strict=True)]
    return dx.view(*dy[0].shape[:-1], d_in) if need_x else dy[0].new_empty(0), dgate, da, db


class _Set:
    """A set of layers as the extension takes it, and the tensors it points to."""

    def __init__(
        self,
        x: Tensor,
        accumulate: bool,
        rows: Sequence[Tensor],
        base: Sequence[Tensor | None],
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        gate: Sequence[Tensor],
        scale: float,
        dropout: tuple[float, Tensor | None],
        h: Tensor,
    ) -> None:
        a, b_t = ([f.to(x.dtype) for f in factors] for factors in (lora_a, [b.t() for b in lora_b]))
        gates: list[Tensor | None] = [g.float().contiguous() for g in gate] or [None] * len(rows)
        self.dropout, hashes = _dropout(*dropout, x.shape[1])
        self._kept_alive = (x, *rows, *base, *a, *b_t, *gates, hashes, h)
        layers = [
            extension().CfloraLayer(
                d_out=row.shape[1],
                rows=row.data_ptr(),
                stride=row.stride(0),
                base=_address(base_i),
                base_stride=0 if base_i is None else base_i.stride(0),
                a=(a_i.data_ptr(), *a_i.stride()),
                b=(b_i.data_ptr(), *b_i.stride()),
                gate=_address(gate_i),
            )
            for row, base_i, a_i, b_i, gate_i in zip(rows, base, a, b_t, gates, strict=True)
        ]
        self.task = extension().Cflora(
            dtype=dtype_name(x.dtype),
            r=h.shape[1] // len(rows),
            d_in=x.shape[1],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            accumulate=accumulate,
            layers=layers,
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
        dtype=dtype_name(right.dtype),
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


def _round_up(count: int, step: int) -> int:
    return cdiv(count, step) * step


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
