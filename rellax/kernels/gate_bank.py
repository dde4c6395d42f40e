"""The gate bank on a GPU: one program for a tile of one projection's outputs or weights.

    forward     normalise         x̂ and 1 / standard deviation of each row of u
                fwd               a tile of GELU(x W1ᵀ + b1) W2ᵀ + b2; the hidden units pass by in tiles
    backward    normalise
                hidden            g = GELU(a) and da = (dflat W2) ∘ GELU'(a), kept for what follows
                output_weights    dW2 = dflatᵀ g and db2
                input_weights     with P = daᵀ x̂: dW1 = P ∘ v + db1 ⊗ c, dv = Σ_h W1 ∘ P, dc = db1 W1, db1
                embedding         (da W1) ∘ v of each projection, and
                du                their sum through the layer norm, where the gradient of u is wanted

Every product is fp32, and every sum has one order: the same bits on every run. Narrower parameters are
widened before: of a tile that a kernel widens itself, Triton may make tf32 although it is told `ieee`
(https://github.com/triton-lang/triton/issues/10176).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.kernels._build import Build, meta, record
from rellax.kernels._host import cdiv, next_power_of_2
from rellax.kernels._tuning import Tuned

# Hidden units, columns of u, outputs.
_TILE = Tuned("gate_bank", {"BLOCK_H": 32, "BLOCK_D": 32, "BLOCK_N": 64})
_SMALL_BATCH = 128  # up to here a tile has few instances: rather more programs than less to read
_SUMMED = 4096  # elements that a program of `du` adds up at once
_WARPS, _STAGES = 8, 2


@triton.jit
def _gelu(a):
    """GELU(a) and its derivative: a Φ(a), Φ(a) + a φ(a)."""
    cdf = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
    return a * cdf, cdf + a * (0.3989422804014327 * tl.exp(-0.5 * a * a))


@triton.jit
def _load(pointer, row, column, rows, columns, stride):
    """A tile, with zeros outside (rows, columns)."""
    known = (row[:, None] < rows) & (column[None, :] < columns)
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer + offset, mask=known, other=0.0)


@triton.jit
def _store(pointer, tile, row, column, rows, columns, stride):
    known = (row[:, None] < rows) & (column[None, :] < columns)
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointer + offset, tile, mask=known)


@triton.jit
def _dot(a, b, sums):
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _hidden(
    normed_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    w1_ptr,
    b1_ptr,
    m,
    row,
    unit,
    B,
    d_u,
    hidden,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a = (x̂ ∘ v + c) W1ᵀ + b1 of projection m: (BLOCK_B, BLOCK_H)."""
    a = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for d in range(0, d_u, BLOCK_D):
        column = d + tl.arange(0, BLOCK_D)
        weight = tl.load(ln_weight_ptr + m * d_u + column, mask=column < d_u, other=0.0)
        bias = tl.load(ln_bias_ptr + m * d_u + column, mask=column < d_u, other=0.0)
        x = _load(normed_ptr, row, column, B, d_u, d_u) * weight[None, :] + bias[None, :]
        w1 = _load(w1_ptr + m * hidden * d_u, unit, column, hidden, d_u, d_u)
        a = _dot(x, tl.trans(w1), a)
    b1 = tl.load(b1_ptr + m * hidden + unit, mask=unit < hidden, other=0.0)
    return a + b1[None, :]


@triton.jit
def _normalise_kernel(u_ptr, normed_ptr, rstd_ptr, d_u, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    u = tl.load(u_ptr + row * d_u + column, mask=column < d_u, other=0.0).to(tl.float32)
    centred = tl.where(column < d_u, u - tl.sum(u) / d_u, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / d_u + tl.cast(eps, tl.float32))
    tl.store(normed_ptr + row * d_u + column, centred * rstd, mask=column < d_u)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _gate_bank_fwd_kernel(
    normed_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    flat_ptr,
    B,
    d_u,
    hidden,
    outputs,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2).to(tl.int64)
    sums = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for h in range(0, hidden, BLOCK_H):
        unit = h + tl.arange(0, BLOCK_H)
        a = _hidden(
            normed_ptr, ln_weight_ptr, ln_bias_ptr, w1_ptr, b1_ptr, m, row, unit, B, d_u, hidden,
            BLOCK_B, BLOCK_H, BLOCK_D,
        )  # fmt: skip
        g, _ = _gelu(a)
        w2 = _load(w2_ptr + m * outputs * hidden, output, unit, outputs, hidden, hidden)
        sums = _dot(g, tl.trans(w2), sums)
    b2 = tl.load(b2_ptr + m * outputs + output, mask=output < outputs, other=0.0)
    _store(flat_ptr + m * B * outputs, sums + b2[None, :], row, output, B, outputs, outputs)


@triton.jit
def _hidden_bwd_kernel(
    normed_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    dflat_ptr,
    g_ptr,
    da_ptr,
    B,
    d_u,
    hidden,
    outputs,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m = tl.program_id(2).to(tl.int64)
    a = _hidden(
        normed_ptr, ln_weight_ptr, ln_bias_ptr, w1_ptr, b1_ptr, m, row, unit, B, d_u, hidden,
        BLOCK_B, BLOCK_H, BLOCK_D,
    )  # fmt: skip
    dg = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    for n in range(0, outputs, BLOCK_D):
        output = n + tl.arange(0, BLOCK_D)
        dflat = _load(dflat_ptr + m * B * outputs, row, output, B, outputs, outputs)
        w2 = _load(w2_ptr + m * outputs * hidden, output, unit, outputs, hidden, hidden)
        dg = _dot(dflat, w2, dg)
    g, slope = _gelu(a)
    _store(g_ptr + m * B * hidden, g, row, unit, B, hidden, hidden)
    _store(da_ptr + m * B * hidden, dg * slope, row, unit, B, hidden, hidden)


@triton.jit
def _output_weights_kernel(
    dflat_ptr,
    g_ptr,
    dw2_ptr,
    db2_ptr,
    B,
    hidden,
    outputs,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    unit = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2).to(tl.int64)
    dw2 = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    db2 = tl.zeros((BLOCK_N,), tl.float32)
    for b in range(0, B, BLOCK_B):
        row = b + tl.arange(0, BLOCK_B)
        dflat = _load(dflat_ptr + m * B * outputs, row, output, B, outputs, outputs)
        g = _load(g_ptr + m * B * hidden, row, unit, B, hidden, hidden)
        dw2 = _dot(tl.trans(dflat), g, dw2)
        db2 += tl.sum(dflat, 0)
    _store(dw2_ptr + m * outputs * hidden, dw2, output, unit, outputs, hidden, hidden)
    first = (tl.program_id(0) == 0) & (output < outputs)
    tl.store(db2_ptr + m * outputs + output, db2, mask=first)


@triton.jit
def _input_weights_kernel(
    normed_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    w1_ptr,
    da_ptr,
    dln_weight_ptr,
    dln_bias_ptr,
    dw1_ptr,
    db1_ptr,
    B,
    d_u,
    hidden,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.program_id(1).to(tl.int64)
    weight = tl.load(ln_weight_ptr + m * d_u + column, mask=column < d_u, other=0.0)
    bias = tl.load(ln_bias_ptr + m * d_u + column, mask=column < d_u, other=0.0)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for h in range(0, hidden, BLOCK_H):
        unit = h + tl.arange(0, BLOCK_H)
        product = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        db1 = tl.zeros((BLOCK_H,), tl.float32)
        for b in range(0, B, BLOCK_B):
            row = b + tl.arange(0, BLOCK_B)
            da = _load(da_ptr + m * B * hidden, row, unit, B, hidden, hidden)
            normed = _load(normed_ptr, row, column, B, d_u, d_u)
            product = _dot(tl.trans(da), normed, product)
            db1 += tl.sum(da, 0)
        w1 = _load(w1_ptr + m * hidden * d_u, unit, column, hidden, d_u, d_u)
        dweight += tl.sum(w1 * product, 0)
        dbias += tl.sum(w1 * db1[:, None], 0)
        dw1 = product * weight[None, :] + db1[:, None] * bias[None, :]
        _store(dw1_ptr + m * hidden * d_u, dw1, unit, column, hidden, d_u, d_u)
        first = (tl.program_id(0) == 0) & (unit < hidden)
        tl.store(db1_ptr + m * hidden + unit, db1, mask=first)
    tl.store(dln_weight_ptr + m * d_u + column, dweight, mask=column < d_u)
    tl.store(dln_bias_ptr + m * d_u + column, dbias, mask=column < d_u)


@triton.jit
def _embedding_kernel(
    ln_weight_ptr,
    w1_ptr,
    da_ptr,
    dnormed_ptr,
    B,
    d_u,
    hidden,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = tl.program_id(2).to(tl.int64)
    dx = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for h in range(0, hidden, BLOCK_H):
        unit = h + tl.arange(0, BLOCK_H)
        da = _load(da_ptr + m * B * hidden, row, unit, B, hidden, hidden)
        w1 = _load(w1_ptr + m * hidden * d_u, unit, column, hidden, d_u, d_u)
        dx = _dot(da, w1, dx)
    weight = tl.load(ln_weight_ptr + m * d_u + column, mask=column < d_u, other=0.0)
    _store(dnormed_ptr + m * B * d_u, dx * weight[None, :], row, column, B, d_u, d_u)


@triton.jit
def _du_kernel(
    dnormed_ptr, normed_ptr, rstd_ptr, du_ptr, M, B, d_u, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    stride = B * tl.full((), d_u, tl.int64)
    dnormed = tl.zeros((BLOCK_D,), tl.float32)
    for m in range(0, M, BLOCK_M):
        projection = m + tl.arange(0, BLOCK_M)
        dnormed += tl.sum(_load(dnormed_ptr + row * d_u, projection, column, M, d_u, stride), 0)
    normed = tl.load(normed_ptr + row * d_u + column, mask=column < d_u, other=0.0)
    along = tl.sum(dnormed * normed) / d_u
    du = tl.load(rstd_ptr + row) * (dnormed - tl.sum(dnormed) / d_u - normed * along)
    tl.store(du_ptr + row * d_u + column, du.to(du_ptr.dtype.element_ty), mask=column < d_u)


def gate_bank_fwd(
    u: Tensor, ln_weight: Tensor, ln_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float
) -> Tensor:
    """As ``rellax.reference.gate_bank.gate_bank_fwd``."""
    (M, hidden, d_u), B, outputs = w1.shape, u.shape[0], w2.shape[1]
    parameters = [x.float().contiguous() for x in (ln_weight, ln_bias, w1, b1, w2, b2)]
    r = math.isqrt(hidden // 2)
    full = outputs == r * r
    gate = u.new_empty((M, B, *((r, r) if full else (r,))), dtype=torch.float32)
    with torch.cuda.device_of(u):
        normed, _ = _normalise(u, eps)
        tile = _tile(B, u.device)
        grid = (cdiv(B, tile["BLOCK_B"]), cdiv(outputs, tile["BLOCK_N"]), M)
        tensors = (normed, *parameters, gate)
        _launch(_gate_bank_fwd_kernel, grid, *tensors, B, d_u, hidden, outputs, **tile)
    return gate if full else torch.diag_embed(gate)


def gate_bank_bwd(
    dgate: Tensor,
    u: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    eps: float,
    need_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``rellax.reference.gate_bank.gate_bank_bwd``."""
    (M, hidden, d_u), B, outputs = w1.shape, u.shape[0], w2.shape[1]
    full = outputs == dgate.shape[-1] ** 2
    dflat = (dgate.flatten(2) if full else dgate.diagonal(dim1=-2, dim2=-1)).contiguous()
    dtype, parameters = w1.dtype, (ln_weight, ln_bias, w1, b1, w2)
    ln_weight, ln_bias, w1, b1, w2 = (x.float().contiguous() for x in parameters)
    gradients = [torch.empty_like(x) for x in (ln_weight, ln_bias, w1, b1, w2, w2[:, :, 0])]
    dln_weight, dln_bias, dw1, db1, dw2, db2 = gradients
    du = u.new_empty(u.shape if need_u else (0,))
    g, da = (dflat.new_empty((M, B, hidden)) for _ in range(2))
    tile = _tile(B, u.device)
    instances, units = cdiv(B, tile["BLOCK_B"]), cdiv(hidden, tile["BLOCK_H"])
    columns = cdiv(d_u, tile["BLOCK_D"])
    with torch.cuda.device_of(u):
        normed, rstd = _normalise(u, eps)
        sizes = (B, d_u, hidden)
        tensors: tuple[Tensor, ...] = (normed, ln_weight, ln_bias, w1, b1, w2, dflat, g, da)
        _launch(_hidden_bwd_kernel, (instances, units, M), *tensors, *sizes, outputs, **tile)
        grid = (units, cdiv(outputs, tile["BLOCK_N"]), M)
        _launch(_output_weights_kernel, grid, dflat, g, dw2, db2, B, hidden, outputs, **tile)
        tensors = (normed, ln_weight, ln_bias, w1, da, dln_weight, dln_bias, dw1, db1)
        _launch(_input_weights_kernel, (columns, M), *tensors, *sizes, **tile)
        if need_u:
            dnormed = dflat.new_empty((M, B, d_u))
            tensors = (ln_weight, w1, da, dnormed)
            _launch(_embedding_kernel, (instances, columns, M), *tensors, *sizes, **tile)
            blocks = {"BLOCK_M": max(_SUMMED // d_u, 1), "BLOCK_D": d_u}
            blocks = {name: next_power_of_2(size) for name, size in blocks.items()}
            _launch(_du_kernel, (B,), dnormed, normed, rstd, du, M, B, d_u, **blocks)
    dln_weight, dln_bias, dw1, db1, dw2, db2 = (gradient.to(dtype) for gradient in gradients)
    return du, dln_weight, dln_bias, dw1, db1, dw2, db2


def _normalise(u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    B, d_u = u.shape
    normed, rstd = u.new_empty((B, d_u), dtype=torch.float32), u.new_empty(B, dtype=torch.float32)
    block = next_power_of_2(d_u)
    _launch(_normalise_kernel, (B,), u.contiguous(), normed, rstd, d_u, eps, BLOCK_D=block)
    return normed, rstd


def _tile(B: int, device: torch.device) -> dict[str, int]:
    return {"BLOCK_B": 16 if B <= _SMALL_BATCH else 64, **_TILE.on(device)}


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **blocks: int) -> None:
    if 0 not in grid:
        taken = {name: size for name, size in blocks.items() if name in kernel.arg_names}
        kernel[grid](*arguments, **taken, num_warps=_WARPS, num_stages=_STAGES)


def builds() -> Iterator[Build]:
    """u in each dtype, small and large batches."""
    dtypes, batches = (torch.float32, torch.bfloat16, torch.float16), (_SMALL_BATCH, _SMALL_BATCH + 1)
    for backend, dtype, B in itertools.product(("cuda", "hip"), dtypes, batches):
        yield from record(f"{dtype} B={B}", functools.partial(_launch_all, dtype, B), backend)


def _launch_all(dtype: torch.dtype, B: int) -> None:
    """Every kernel, forward and backward, for tensors without memory."""
    M, d_u, hidden, outputs, eps = 28, 64, 128, 64, 1e-5
    u, norm = meta(B, d_u, dtype=dtype), meta(M, d_u)
    w1, b1 = meta(M, hidden, d_u), meta(M, hidden)
    w2, b2 = meta(M, outputs, hidden), meta(M, outputs)
    gate = gate_bank_fwd(u, norm, norm, w1, b1, w2, b2, eps)
    gate_bank_bwd(gate, u, norm, norm, w1, b1, w2, eps, True)
