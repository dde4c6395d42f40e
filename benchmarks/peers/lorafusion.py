"""CFLoRA by LoRAFusion's split, on CUDA: one product that carries the low-rank update in its own accumulator.

Written from the published description (Zhu et al., "LoRAFusion", arXiv:2510.00206): the shrink is a product
of its own, and x Wᵀ + z Bᵀ one kernel, as is dy W + dh A in the backward pass. Theirs is plain LoRA; the gate
between the two is torch's batched product here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cflora import narrow

_BLOCK = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
_GROUP = tl.constexpr(8)  # rows of blocks that share columns of W in the L2 cache


@triton.jit
def _product_and_update_kernel(
    x_ptr,
    weight_ptr,
    z_ptr,
    factor_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_wk,
    stride_wn,
    stride_fr,
    stride_fn,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y (M, N) = x (M, K) weight (K, N) + z (M, r) factor (r, N)."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (_GROUP * columns)
    height = tl.minimum(rows - group * _GROUP, _GROUP)
    within = tl.program_id(0) % (_GROUP * columns)
    row = ((group * _GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * K + k[None, :], mask=(row < M) & (k[None, :] < K), other=0.0)
        offset = k[:, None].to(tl.int64) * stride_wk + column * stride_wn
        weight = tl.load(weight_ptr + offset, mask=(k[:, None] < K) & (column < N), other=0.0)
        total = tl.dot(x, weight, total)
    r = tl.arange(0, BLOCK_R)
    z = tl.load(z_ptr + row * RANK + r[None, :], mask=(row < M) & (r[None, :] < RANK), other=0.0)
    offset = r[:, None] * stride_fr + column * stride_fn
    factor = tl.load(factor_ptr + offset, mask=(r[:, None] < RANK) & (column < N), other=0.0)
    total = tl.dot(z, factor, total)
    tl.store(y_ptr + row * N + column, total.to(y_ptr.dtype.element_ty), mask=(row < M) & (column < N))


def _product_and_update(x: Tensor, weight: Tensor, z: Tensor, factor: Tensor) -> Tensor:
    """x (…, K) weight (K, N) + z (…, r) factor (r, N)."""
    (k, n), rank = weight.shape, len(factor)
    y = x.new_empty((*x.shape[:-1], n))
    m = y.shape[:-1].numel()
    grid = (triton.cdiv(m, _BLOCK["BLOCK_M"]) * triton.cdiv(n, _BLOCK["BLOCK_N"]),)
    strides = (*weight.stride(), *factor.stride())
    block = max(16, triton.next_power_of_2(rank))
    _product_and_update_kernel[grid](
        x.contiguous(), weight, z.contiguous(), factor, y, m, n, k, *strides,
        RANK=rank, BLOCK_R=block, **_BLOCK, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


class _LoRAFusion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, gate: Tensor, scale: float
    ) -> Tensor:
        h = x @ a.t()
        ctx.save_for_backward(h, weight, a, b, gate)
        ctx.scale = scale
        return _product_and_update(x, weight.t(), (h @ gate).mul_(scale), b.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, weight, a, b, gate = ctx.saved_tensors
        dz = (dy @ b).mul_(ctx.scale)
        return _product_and_update(dy, weight, dz @ gate.mT, a), None, None, None, h.mT @ dz, None


def lorafusion(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    a, b = narrow(a, x.dtype), narrow(b, x.dtype)
    y: Tensor = _LoRAFusion.apply(x, weight, a, b, gate.to(x.dtype), scale)
    return y
