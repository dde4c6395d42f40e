"""CFLoRA on a GPU: small kernels around torch's own products with the frozen weights.

    forward     shrink   h = c · keep(x) Aᵀ of all layers, in one read of x
                expand   y = s · h G Bᵀ + bias, in one write of y; torch then adds x Wᵀ to it in place
    backward    shrink   dy B of a layer, in one read of its dy
                combine  dx = Σ keep(c · s · dy B Gᵀ A) over the layers, in one write of dx; torch then adds
                         each dy W to it in place; on the way each tile's part of dG, and dh, z where wanted
                outer    dA = dhᵀ keep(x) and dB = dyᵀ z, in one read of x and dy

The gate is applied where the second kernel begins, not where the first one ends: the shrink kernel then knows
nothing of instances, and where tokens are few it is split over columns, the second kernel adding the parts.
Every sum runs in a fixed order. ``rellax.reference.cflora`` is the specification.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.errors import InputError
from rellax.kernels._build import Build, meta, record
from rellax.kernels._host import cdiv, next_power_of_2, rows_of
from rellax.kernels._tiles import tile_table, tile_tokens
from rellax.kernels._tuning import SMALL, Tuned

MAX_RANK = 64
_STEP = tl.constexpr(16)  # of the sums in the small fp32 products


@triton.jit
def _mix(h):
    """The 32-bit mixer of the reference's dropout."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _keep(seed_ptr, row, column, threshold):
    """Whether dropout keeps the element (row, column): the reference's hash, bit for bit."""
    seed = tl.load(seed_ptr)
    row = _mix(_mix(row.to(tl.uint32)) ^ seed.to(tl.uint32))
    column = _mix(_mix(column.to(tl.uint32)) + (seed >> 32).to(tl.uint32))
    return _mix(row ^ column).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _load_factor(ptr, component, column, d, RANK: tl.constexpr, UP: tl.constexpr):
    """A (r, d) at (component, column); UP: B (d, r) at (column, component)."""
    offset = column * RANK + component if UP else component * d + column
    return tl.load(ptr + offset, mask=(component < RANK) & (column < d), other=0.0)


@triton.jit
def _load_sum(ptr, stride_split, row, end, stride, component, RANK: tl.constexpr, SPLITS: tl.constexpr):
    """h or dy B at (row, component): the parts of the split product, added in order."""
    offset = row * stride + component
    inside = (row < end) & (component < RANK)
    total = tl.load(ptr + offset, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptr + split * stride_split + offset, mask=inside, other=0.0)
    return total


@triton.jit
def _load_gated(
    ptr,
    stride_split,
    row,
    end,
    stride,
    gate_ptr,
    instance,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The rows of h or dy B, times G, or Gᵀ: fp32. No gates are the identity."""
    right = tl.arange(0, BLOCK_R)[None, :]
    if gate_ptr is None:
        total = _load_sum(ptr, stride_split, row, end, stride, right, RANK, SPLITS)
    else:
        total = tl.zeros((row.shape[0], BLOCK_R), tl.float32)
        gate_ptr += instance.to(tl.int64) * (RANK * RANK)
        for k in range(0, RANK, _STEP):
            step = k + tl.arange(0, _STEP)
            part = _load_sum(ptr, stride_split, row, end, stride, step[None, :], RANK, SPLITS)
            left = step[:, None]
            offset = right * RANK + left if TRANSPOSED else left * RANK + right
            gate = tl.load(gate_ptr + offset, mask=(left < RANK) & (right < RANK), other=0.0)
            total = tl.dot(part, gate.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
def _find_tile(tile, cu_seqlens_ptr, tiles_ptr, instances, length, per_instance, BLOCK_T: tl.constexpr):
    """(instance, first token, end) of a tile: from the batch's table, or for instances of one length.

    The table has tiles that are not needed: they begin past their end.
    """
    if tiles_ptr is None:
        instance = tile // per_instance
        start = instance.to(tl.int64) * length + (tile % per_instance) * BLOCK_T
        end = (instance.to(tl.int64) + 1) * length
    else:
        instance = tl.load(tiles_ptr + instances + 1 + tile)
        before = tl.load(tiles_ptr + instance)
        start = tl.load(cu_seqlens_ptr + instance).to(tl.int64) + (tile - before) * BLOCK_T
        end = tl.load(cu_seqlens_ptr + instance + 1, mask=instance < instances, other=0).to(tl.int64)
    return instance, start, end


@triton.jit(do_not_specialize=["tokens", "steps", "threshold"])
def _shrink_kernel(
    x_ptr,
    factor_ptrs,
    out_ptr,
    seed_ptr,
    tokens,
    d,
    steps,
    stride_x,
    stride_split,
    stride_out,
    threshold,
    scale,
    RANK: tl.constexpr,
    LAYERS: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, t, i r + j] = scale · Σ keep(x)[t, c] A_i[j, c], UP: B_i[c, j], over `steps` blocks of c."""
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    component = tl.arange(0, BLOCK_R)[None, :]
    totals = ()
    for _ in tl.static_range(LAYERS):
        totals += (tl.zeros((BLOCK_T, BLOCK_R), tl.float32),)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(d, BLOCK_D))):
        column = step * BLOCK_D + tl.arange(0, BLOCK_D)
        x_column = column[None, :]
        x = tl.load(x_ptr + row * stride_x + x_column, mask=(row < tokens) & (x_column < d), other=0.0)
        if seed_ptr is not None:
            x = tl.where(_keep(seed_ptr, row, x_column, threshold), x, 0.0)
        sums = ()
        for i in tl.static_range(LAYERS):
            factor = _load_factor(factor_ptrs[i], component, column[:, None], d, RANK, UP).to(x.dtype)
            if x.dtype == tl.float32:
                # One chain of d fused products rounds worse than sums of sums; a plain sum would become that.
                sums += (totals[i] + tl.dot(x, factor, input_precision="ieee") * scale,)
            else:
                sums += (tl.dot(x, factor, totals[i]),)
        totals = sums
    out_ptr += split.to(tl.int64) * stride_split + row * stride_out + component
    for i in tl.static_range(LAYERS):
        total = totals[i] if x_ptr.dtype.element_ty == tl.float32 else totals[i] * scale
        tl.store(out_ptr + i * RANK, total, mask=(row < tokens) & (component < RANK))


@triton.jit(do_not_specialize=["instances", "length", "per_instance", "groups"])
def _expand_kernel(
    partial_ptr,
    h_ptr,
    gate_ptr,
    factor_ptr,
    bias_ptr,
    base_ptr,
    y_ptr,
    cu_seqlens_ptr,
    tiles_ptr,
    instances,
    length,
    per_instance,
    groups,
    d,
    stride_split,
    stride_h,
    stride_base,
    scale,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = scale · h G Bᵀ + bias + base for a tile of tokens and every `groups`-th block of columns.

    h is the sum of the parts; where there are several, it is written too.
    """
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    instance, start, end = _find_tile(
        tile, cu_seqlens_ptr, tiles_ptr, instances, length, per_instance, BLOCK_T
    )
    if start >= end:
        return
    row = start + tl.arange(0, BLOCK_T)[:, None]
    z = _load_gated(
        partial_ptr, stride_split, row, end, stride_h, gate_ptr, instance, RANK, SPLITS, False, BLOCK_R
    )
    z = (z * scale).to(y_ptr.dtype.element_ty)
    if SPLITS > 1:  # noqa: SIM102, it is decided when compiling
        if group == 0:
            component = tl.arange(0, BLOCK_R)[None, :]
            h = _load_sum(partial_ptr, stride_split, row, end, stride_h, component, RANK, SPLITS)
            tl.store(h_ptr + row * stride_h + component, h, mask=(row < end) & (component < RANK))
    for block in range(group, tl.cdiv(d, BLOCK_D), groups):
        column = block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        inside = (row < end) & (column < d)
        factor = _load_factor(factor_ptr, tl.arange(0, BLOCK_R)[:, None], column, d, RANK, True)
        y = tl.dot(z, factor.to(z.dtype), input_precision="ieee")
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=column < d, other=0.0).to(tl.float32)
        if base_ptr is not None:
            y += tl.load(base_ptr + row * stride_base + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * d + column, y, mask=inside)


@triton.jit(do_not_specialize=["instances", "length", "per_instance", "groups", "tiles", "threshold"])
def _combine_kernel(
    partial_ptr,
    h_ptr,
    gate_ptrs,
    factor_ptrs,
    dx_ptr,
    dh_ptr,
    z_ptr,
    dgate_ptr,
    seed_ptr,
    cu_seqlens_ptr,
    tiles_ptr,
    instances,
    length,
    per_instance,
    groups,
    tiles,
    d,
    stride_split,
    stride_h,
    threshold,
    scale,
    kept,
    RANK: tl.constexpr,
    LAYERS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dx = keep(Σ dh A) for a tile of tokens and every `groups`-th block of columns, dh = kept scale dy B Gᵀ.

    The first group also writes, where they are wanted, dh, z = scale · h G and the tile's part of
    dG = scale · hᵀ dy B.
    """
    tile, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    instance, start, end = _find_tile(
        tile, cu_seqlens_ptr, tiles_ptr, instances, length, per_instance, BLOCK_T
    )
    if start >= end:
        return
    row = start + tl.arange(0, BLOCK_T)[:, None]
    left, right = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_R)[None, :]
    inside = (row < end) & (right < RANK)
    dhs = ()
    for i in tl.static_range(LAYERS):
        gate_ptr = None if gate_ptrs is None else gate_ptrs[i]
        parts, h, own = partial_ptr + i * RANK, h_ptr + i * RANK, row * stride_h + i * RANK + right
        dh = _load_gated(
            parts, stride_split, row, end, stride_h, gate_ptr, instance, RANK, SPLITS, True, BLOCK_R
        )
        dhs += ((dh * (scale * kept)).to(dx_ptr.dtype.element_ty),)
        if group == 0:
            if dh_ptr is not None:
                tl.store(dh_ptr + own, dhs[i], mask=inside)
            if z_ptr is not None:
                z = _load_gated(h, 0, row, end, stride_h, gate_ptr, instance, RANK, 1, False, BLOCK_R)
                tl.store(z_ptr + own, z * scale, mask=inside)
            if dgate_ptr is not None:
                dgate = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
                for k in range(0, BLOCK_T, _STEP):
                    step = start + k + tl.arange(0, _STEP)
                    dz = _load_sum(parts, stride_split, step[:, None], end, stride_h, right, RANK, SPLITS)
                    h_step = _load_sum(h, 0, step[None, :], end, stride_h, left, RANK, 1)
                    dgate = tl.dot(h_step, dz, dgate, input_precision="ieee")
                offset = (i * tiles + tile).to(tl.int64) * (RANK * RANK) + left * RANK + right
                tl.store(dgate_ptr + offset, dgate * scale, mask=(left < RANK) & (right < RANK))
    for block in range(group, tl.cdiv(d, BLOCK_D), groups):
        column = block * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for i in tl.static_range(LAYERS):
            factor = _load_factor(factor_ptrs[i], left, column, d, RANK, False)
            dx = tl.dot(dhs[i], factor.to(dhs[i].dtype), dx, input_precision="ieee")
        if seed_ptr is not None:
            dx = tl.where(_keep(seed_ptr, row, column, threshold), dx, 0.0)
        tl.store(dx_ptr + row * d + column, dx, mask=(row < end) & (column < d))


@triton.jit(do_not_specialize=["instances", "per_instance", "tiles"])
def _dgate_kernel(
    part_ptr,
    dgate_ptrs,
    before_ptr,
    instances,
    per_instance,
    tiles,
    RANK: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dG of one instance and layer: the sum of its tiles' parts, `BLOCK_T` at a time, in order."""
    layer, instance = tl.program_id(0) // instances, tl.program_id(0) % instances
    if before_ptr is None:
        first, last = instance * per_instance, (instance + 1) * per_instance
    else:
        first, last = tl.load(before_ptr + instance), tl.load(before_ptr + instance + 1)
    element = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = element < RANK * RANK
    total = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)[:, None]
        offset = (layer * tiles + tile).to(tl.int64) * (RANK * RANK) + element[None, :]
        total += tl.sum(tl.load(part_ptr + offset, mask=(tile < last) & inside[None, :], other=0.0), 0)
    for i in tl.static_range(LAYERS):
        if layer == i:
            tl.store(dgate_ptrs[i] + instance.to(tl.int64) * (RANK * RANK) + element, total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "steps", "threshold"])
def _outer_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    seed_ptr,
    tokens,
    d,
    steps,
    stride_left,
    stride_right,
    threshold,
    WIDTH: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split] = leftᵀ keep(right), (WIDTH, d), over `steps` blocks of tokens; UP: its transpose."""
    split = tl.program_id(1)
    parts = tl.cdiv(WIDTH, BLOCK_R)
    component = tl.program_id(0) % parts * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) // parts * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(tokens, BLOCK_T))):
        row = (step * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
        left_mask = (row < tokens) & (component[None, :] < WIDTH)
        left = tl.load(left_ptr + row * stride_left + component[None, :], mask=left_mask, other=0.0)
        right_mask = (row < tokens) & (column < d)
        right = tl.load(right_ptr + row * stride_right + column, mask=right_mask, other=0.0)
        if seed_ptr is not None:
            right = tl.where(_keep(seed_ptr, row, column, threshold), right, 0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    component = component[:, None]
    offset = column * WIDTH + component if UP else component * d + column
    out_ptr += split.to(tl.int64) * WIDTH * d
    tl.store(out_ptr + offset, total, mask=(component < WIDTH) & (column < d))


class _Blocks(NamedTuple):
    """Tokens, columns and components of a block, and the launch's warps and pipeline stages."""

    BLOCK_T: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


# Up to so many components, padded and of all layers: bytes of a row in a block of 64 tokens, warps, stages.
_SHRINK = Tuned(
    "cflora shrink",
    {64: (128, 4, 4), 128: (128, 8, 3), 256: (64, 8, 3)},
    **{name: {64: (128, 4, 3)} for name in SMALL},
)
_EXPAND = Tuned("cflora expand", {16: (128, 4, 2), 128: (128, 8, 2), 256: (64, 8, 2), 1024: (64, 8, 1)})
_OUTER = Tuned("cflora outer", {32: (128, 4, 3), 64: (128, 8, 3)})


def _padded(rank: int) -> int:
    """Components, as many as matrix instructions take."""
    return max(16, next_power_of_2(rank))


def _blocks(
    table: dict[int, tuple[int, int, int]], tokens: int, components: int, layers: int, itemsize: int
) -> _Blocks:
    components = _padded(components)
    row_bytes, num_warps, num_stages = table[min(most for most in table if most >= layers * components)]
    if torch.version.hip is not None:  # warps twice as wide, 64 KB of shared memory
        num_warps, num_stages = 4, min(num_stages, 2)
    columns = row_bytes // itemsize * (1 if tokens >= 64 else 2)
    return _Blocks(tokens, columns, components, num_warps, num_stages)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """How many are to be kept busy; interpreted as on an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _dropped(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """The seed where anything is dropped, the least hash that is kept, the factor that makes up for it."""
    return seed if p else None, min(round(p * 2**32), 2**32 - 1) - 2**31, 1 / (1 - p)


class _Cut(NamedTuple):
    """How tokens are cut into tiles of one instance each: the kernels' arguments, tiles, tokens of a tile."""

    cu_seqlens: Tensor | None
    table: Tensor | None
    instances: int
    length: int
    per_instance: int
    tiles: int
    size: int


def _cut(shape: torch.Size, gate: Sequence[Tensor], cu_seqlens: Tensor | None, table: Tensor | None) -> _Cut:
    """Without gates all tokens are one instance."""
    tokens = shape[:-1].numel()
    if gate and cu_seqlens is not None:
        table = tile_table(cu_seqlens, tokens) if table is None else table
        instances = len(cu_seqlens) - 1
        tiles, size = len(table) - instances - 1, tile_tokens(tokens, instances)
        return _Cut(cu_seqlens.contiguous(), table.contiguous(), instances, 0, 0, tiles, size)
    instances, length = (shape[0], shape[1]) if gate else (1, tokens)
    size = tile_tokens(tokens, instances)
    per_instance = cdiv(length, size)
    return _Cut(None, None, instances, length, per_instance, instances * per_instance, size)


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
    """As ``rellax.reference.cflora.cflora_fwd``, for fp32, bf16 and fp16."""
    rank, rows, cut = _rank(lora_a), rows_of(x), _cut(x.shape, gate, cu_seqlens, tiles)
    with torch.cuda.device_of(x):
        partial = _new_partial(rows, rows.shape[1], rank, len(lora_a))
        _shrink(partial, rows, lora_a, False, dropout, seed)
        h = partial[0] if len(partial) == 1 else torch.empty_like(partial[0])
        outputs = []
        for i, (h_i, partial_i, b) in enumerate(
            zip(h.split(rank, 1), partial.split(rank, 2), lora_b, strict=True)
        ):
            outputs.append(x.new_empty((*x.shape[:-1], len(b))))
            y = rows_of(outputs[i])
            bias_i, base_i = (bias[i], None) if weight else (None, base[i])
            _expand(y, h_i, partial_i, gate[i] if gate else None, b, bias_i, base_i, scale, cut)
            if weight:
                y.addmm_(rows, weight[i].t())
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
    """As ``rellax.reference.cflora.cflora_bwd``, for fp32, bf16 and fp16."""
    need_x, need_gate, need_a, need_b = needs
    rank, rows = _rank(lora_a), [rows_of(dy_i) for dy_i in dy]
    cut = _cut(dy[0].shape, gate, cu_seqlens, tiles)
    h, new = h.contiguous(), dy[0].new_empty
    with torch.cuda.device_of(h):
        partial = _new_partial(rows[0], max(row.shape[1] for row in rows), rank, len(lora_a))
        for partial_i, row, b in zip(partial.split(rank, 2), rows, lora_b, strict=True):
            _shrink(partial_i, row, [b], True, 0.0, None)
        dx = new((len(h), lora_a[0].shape[1] if need_x else 0))
        dh, z = new(h.shape) if need_a else None, new(h.shape) if need_b else None
        parts = h.new_empty((len(gate), cut.tiles, rank, rank)) if need_gate and gate else None
        _combine(dx, dh, z, parts, partial, h, gate, lora_a, scale, cut, dropout, seed)
        dgate = [] if parts is None else _sum_parts(parts, gate, cut)
        da, db = [], []
        if dh is not None and x is not None:
            da = _sum_splits(_outer(dh, rows_of(x), False, dropout, seed).split(rank, 1), lora_a)
        if z is not None:
            pairs = zip(z.split(rank, 1), rows, strict=True)
            db = _sum_splits([_outer(z_i, row, True, 0.0, None) for z_i, row in pairs], lora_b)
        if not need_x:
            return new(0), dgate, da, db
        for row, w in zip(rows, weight, strict=bool(weight)):
            dx.addmm_(row, w)
    return dx.view(*dy[0].shape[:-1], dx.shape[1]), dgate, da, db


def _rank(lora_a: Sequence[Tensor]) -> int:
    rank, layers, most = lora_a[0].shape[0], len(lora_a), max(_EXPAND)
    if rank > MAX_RANK:
        raise InputError(f"lora_a: expected a rank up to {MAX_RANK}, which Triton's kernels take, got {rank}")
    if layers * _padded(rank) > most:
        expected = f"up to {most // _padded(rank)} layers of rank {rank}, which Triton's kernels take"
        raise InputError(f"lora_a: expected {expected}, got {layers}")
    return rank


def _shrink_tokens(tokens: int, itemsize: int) -> int:
    """Tokens of a block: tall ones read A and B less often, where they fill the device and fit registers."""
    return 128 if tokens >= 4096 and itemsize == 2 else 64


def _new_partial(rows: Tensor, d: int, rank: int, layers: int) -> Tensor:
    """Room for h or dy B, (T, n r), in as many parts over the d columns as fill the device: (S, T, n r)."""
    tokens, itemsize = len(rows), rows.itemsize
    blocks = _blocks(_SHRINK.on(rows.device), _shrink_tokens(tokens, itemsize), rank, 1, itemsize)
    programs = max(1, cdiv(tokens, blocks.BLOCK_T))
    most = min(8, 2 * _multiprocessors(rows.device) // programs, cdiv(d, blocks.BLOCK_D) // 2)
    splits = 1
    while 2 * splits <= most:
        splits *= 2
    return rows.new_empty((splits, tokens, layers * rank), dtype=torch.float32)


def _shrink(
    out: Tensor, x: Tensor, factors: Sequence[Tensor], up: bool, dropout: float, seed: Tensor | None
) -> None:
    """out (S, T, n r) = c · keep(x) Aᵀ for factors A (r, d); `up`: c · keep(x) B for factors B (d, r)."""
    (splits, tokens, width), d = out.shape, x.shape[1]
    rank = width // len(factors)
    seed, threshold, kept = _dropped(dropout, seed)
    table, step = _SHRINK.on(x.device), max(_SHRINK) // _padded(rank)
    for i in range(0, len(factors), step):
        some = _contiguous(factors[i : i + step])
        blocks = _blocks(table, _shrink_tokens(tokens, x.itemsize), rank, len(some), x.itemsize)
        _shrink_kernel[(cdiv(tokens, blocks.BLOCK_T), splits)](
            x,
            some,
            out[..., i * rank :],
            seed,
            tokens,
            d,
            cdiv(cdiv(d, blocks.BLOCK_D), splits),
            x.stride(0),
            out.stride(0),
            out.stride(1),
            threshold,
            kept,
            RANK=rank,
            LAYERS=len(some),
            UP=up,
            **blocks._asdict(),
        )


def _groups(tiles: int, d: int, blocks: _Blocks, device: torch.device) -> int:
    """Programs of a tile: few, as each applies the gate anew, but enough to fill the device."""
    most = 24 // blocks.num_warps * _multiprocessors(device) // max(tiles, 1)
    return max(1, min(most, cdiv(d, blocks.BLOCK_D)))


def _expand(
    y: Tensor,
    h: Tensor,
    partial: Tensor,
    gate: Tensor | None,
    lora_b: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    scale: float,
    cut: _Cut,
) -> None:
    """y (T, d_out) = scale · h G Bᵀ + bias + base, and h (T, r) = the sum of the parts (S, T, r)."""
    (d, rank), base = lora_b.shape, None if base is None else rows_of(base)
    blocks = _blocks(_EXPAND.on(y.device), cut.size, rank, 1, y.itemsize)
    groups = _groups(cut.tiles, d, blocks, y.device)
    _expand_kernel[(cut.tiles * groups,)](
        partial,
        h,
        None if gate is None else gate.contiguous(),
        lora_b.contiguous(),
        None if bias is None else bias.contiguous(),
        base,
        y,
        cut.cu_seqlens,
        cut.table,
        cut.instances,
        cut.length,
        cut.per_instance,
        groups,
        d,
        partial.stride(0),
        partial.stride(1),
        0 if base is None else base.stride(0),
        scale,
        RANK=rank,
        SPLITS=len(partial),
        **blocks._asdict(),
    )


def _combine(
    dx: Tensor,
    dh: Tensor | None,
    z: Tensor | None,
    parts: Tensor | None,
    partial: Tensor,
    h: Tensor,
    gate: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    scale: float,
    cut: _Cut,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """dx (T, d_in or 0), dh and z (T, n r) and the tiles' parts of dG (n, tiles, r, r), from dy B and h."""
    rank, d = lora_a[0].shape[0], dx.shape[1]
    blocks = _blocks(_EXPAND.on(dx.device), cut.size, rank, len(lora_a), dx.itemsize)
    groups = _groups(cut.tiles, d, blocks, dx.device)
    seed, threshold, kept = _dropped(dropout, seed)
    _combine_kernel[(cut.tiles * groups,)](
        partial,
        h,
        _contiguous(gate) or None,
        _contiguous(lora_a),
        dx,
        dh,
        z,
        parts,
        seed,
        cut.cu_seqlens,
        cut.table,
        cut.instances,
        cut.length,
        cut.per_instance,
        groups,
        cut.tiles,
        d,
        partial.stride(0),
        partial.stride(1),
        threshold,
        scale,
        kept,
        RANK=rank,
        LAYERS=len(lora_a),
        SPLITS=len(partial),
        **blocks._asdict(),
    )


def _sum_parts(parts: Tensor, gate: Sequence[Tensor], cut: _Cut) -> list[Tensor]:
    """dG of each layer, in its gate's dtype, from the tiles' parts."""
    layers, tiles, rank, _ = parts.shape
    dgate = [gate_i.new_empty(gate_i.shape) for gate_i in gate]
    elements = 64
    _dgate_kernel[(layers * cut.instances, cdiv(rank * rank, elements))](
        parts,
        tuple(dgate),
        cut.table,
        cut.instances,
        cut.per_instance,
        tiles,
        RANK=rank,
        LAYERS=layers,
        BLOCK_T=128,
        BLOCK_E=elements,
    )
    return dgate


def _outer(left: Tensor, right: Tensor, up: bool, dropout: float, seed: Tensor | None) -> Tensor:
    """leftᵀ keep(right) of left (T, w), right (T, d), in parts over tokens: (S, w, d); `up`: (S, d, w)."""
    (tokens, width), d = left.shape, right.shape[1]
    components = min(width, max(_OUTER))
    blocks = _blocks(_OUTER.on(right.device), 128 // right.itemsize, components, 1, right.itemsize)
    programs = cdiv(width, blocks.BLOCK_R) * cdiv(d, blocks.BLOCK_D)
    steps = cdiv(tokens, blocks.BLOCK_T)
    splits = max(1, min(16, 4 * _multiprocessors(right.device) // max(programs, 1), steps // 4))
    out = left.new_empty((splits, d, width) if up else (splits, width, d), dtype=torch.float32)
    seed, threshold, _ = _dropped(dropout, seed)
    _outer_kernel[(programs, splits)](
        left,
        right,
        out,
        seed,
        tokens,
        d,
        cdiv(steps, splits),
        left.stride(0),
        right.stride(0),
        threshold,
        WIDTH=width,
        UP=up,
        **blocks._asdict(),
    )
    return out


def _sum_splits(products: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The products, their parts added, in the parameters' dtype."""
    return [product.sum(0).to(tensor.dtype) for product, tensor in zip(products, like, strict=True)]


def builds() -> Iterator[Build]:
    """All dtypes and blocks: for one layer, padded, and for three foreign ones, packed, with dropout.

    fp16 compiles as bf16 does.
    """
    dtypes, ranks, batches = (torch.bfloat16, torch.float32), (16, 32, 64), ((512, 32), (8192, 8))
    for backend, dtype, rank, (tokens, instances), n in itertools.product(
        ("cuda", "hip", "sm_89"), dtypes, ranks, batches, (1, 3)
    ):
        launch = functools.partial(_launch_all, dtype, tokens, instances, rank, n)
        yield from record(f"{dtype} T={tokens} B={instances} r={rank} n={n}", launch, backend)


def _launch_all(dtype: torch.dtype, tokens: int, instances: int, rank: int, layers: int) -> None:
    """Every kernel, forward and backward, for tensors without memory."""
    d, n, new = 4096, layers, functools.partial(meta, dtype=dtype)
    lora_a, lora_b, gate = (
        [new(*shape, dtype=torch.float32)] * n for shape in ((rank, d), (d, rank), (instances, rank, rank))
    )
    weight, bias, base, offsets, tiles, dropout, seed = [new(d, d)], [new(d)], [], None, None, 0.0, None
    x = new(instances, tokens // instances, d)
    if n > 1:
        x, weight, base = new(tokens, d), [], [new(tokens, d)] * n
        offsets, dropout, seed = new(instances + 1, dtype=torch.int32), 0.1, new(dtype=torch.int64)
        tiles = tile_table(offsets, tokens)
    y, h = cflora_fwd(x, weight, bias, base, lora_a, lora_b, gate, 2.0, offsets, tiles, dropout, seed)
    needs = [True] * 4
    cflora_bwd(y, x, weight, lora_a, lora_b, gate, h, 2.0, offsets, tiles, dropout, seed, needs)
