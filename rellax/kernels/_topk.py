"""The k best of many candidates on chip: what the kernels of history_topk and item_topk share.

A candidate is one 64-bit key, the score's bits in their numerical order above its rank, a number in [0, 2³¹)
that says which of equal scores comes first: the larger. So all keys of a row differ, their order is the
results' order, and whichever way the best of them are found the result is the same. A row of `best` has the K
best keys so far, in no order; those that no candidate has taken yet lie below the key of any score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.kernels._host import next_power_of_2
from rellax.kernels._tuning import SMALL, Tuned

LIMIT = 128
"""Results of a query that one pass can keep on chip."""

_LOWEST = tl.constexpr(-(2**31))
_MAGNITUDE = tl.constexpr(2**31 - 1)


class Blocks(NamedTuple):
    """Queries, candidates, columns and results of a block, and the launch's warps and pipeline stages."""

    BLOCK_Q: int
    BLOCK_C: int
    BLOCK_D: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


_MANY = Tuned("top-k, many results", {"BLOCK_C": 256}, **{name: {"BLOCK_C": 128} for name in SMALL})


def blocks(queries: int, k: int, table: Tensor) -> Blocks:
    """Few queries to a block where there are no more of a kind, or where many results must be kept.

    Args:
        queries: the most that a block may have.
        k: results that are wanted.
    """
    results = max(32, next_power_of_2(min(k, LIMIT)))
    size = min(queries, 2048 // results)
    half = table.itemsize == 2
    many = _MANY.on(table.device)["BLOCK_C"]
    candidates = {
        64: 64,
        32: 128 if half else 64,
        16: many if half and results == LIMIT else 64 if half else 128,
    }[size]
    num_warps, num_stages = (8, 3) if size == 64 else (4, 3 if size == 32 and half else 4)
    if torch.version.hip is not None:  # warps twice as wide, 64 KB of shared memory
        candidates, num_warps, num_stages = 64, 4, 2
    return Blocks(size, candidates, 128 // table.itemsize, results, num_warps, num_stages)


def precision(table: Tensor) -> str:
    """How the kernels multiply rows of `table` to fp32's precision.

    Products of half precision numbers are exact in fp32 as they are. An fp32 number is the sum of three bf16
    ones, and six products of these on NVIDIA's tensor cores are faster than one in fp32 beside them; AMD's
    matrix instructions take fp32 itself, and the interpreter knows nothing else.
    """
    wide, nvidia = table.dtype == torch.float32, torch.version.hip is None and table.device.type != "cpu"
    return "bf16x6" if wide and nvidia else "ieee"


@triton.jit
def dot_rows(table_ptr, left, right, rows, d, stride, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """<table[left_i], table[right_j]>, which is NaN where there is no such row."""
    left_known, right_known = (left >= 0) & (left < rows), (right >= 0) & (right < rows)
    left_ptr = table_ptr + left.to(tl.int64)[:, None] * stride
    right_ptr = table_ptr + right.to(tl.int64)[None, :] * stride
    sums = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        a = tl.load(left_ptr + column[None, :], mask=left_known[:, None] & (column < d)[None, :], other=0.0)
        b = tl.load(right_ptr + column[:, None], mask=right_known[None, :] & (column < d)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return tl.where(left_known[:, None] & right_known[None, :], sums, float("nan"))


@triton.jit
def pack(scores, rank):
    """The keys of finite scores; zeros of both signs are equal."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (ordered.to(tl.int64) << 32) | rank.to(tl.int64)


@triton.jit
def unpack(keys):
    """(scores, ranks) of keys: -inf and -1 where no candidate has taken the place."""
    ordered = (keys >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ _MAGNITUDE, ordered)
    taken = ordered > _LOWEST
    scores = tl.where(taken, bits.to(tl.float32, bitcast=True), -float("inf"))
    return scores, tl.where(taken, (keys & 0x7FFFFFFF).to(tl.int32), -1)


@triton.jit
def nothing(BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """A `best` without candidates; its keys differ as well."""
    lowest = (tl.zeros((BLOCK_Q, BLOCK_K), tl.int64) + _LOWEST) << 32
    return lowest + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def insert(best, scores, rank):
    """The best of `best` (Q, K) and of a tile's candidates: scores (Q, C), -inf for none, and rank (C,).

    Each round takes every row's best candidate out of the tile, and into the place of the row's lowest key if
    it is better; it ends when that is so in no row. All but the first tiles take few rounds, most take none.
    """
    rank = tl.broadcast_to(rank[None, :], scores.shape)
    lowest = tl.min(best, 1)
    top = tl.max(scores, 1)
    first = tl.max(tl.where(scores == top[:, None], rank, -1), 1)
    key = tl.where(top > -float("inf"), pack(top, first), lowest)
    while tl.max((key > lowest).to(tl.int32), 0) > 0:
        best = tl.where((best == lowest[:, None]) & (key > lowest)[:, None], key[:, None], best)
        scores = tl.where(rank == first[:, None], -float("inf"), scores)
        lowest = tl.min(best, 1)
        top = tl.max(scores, 1)
        first = tl.max(tl.where(scores == top[:, None], rank, -1), 1)
        key = tl.where(top > -float("inf"), pack(top, first), lowest)
    return best


@triton.jit
def consider(best, damaged, products, candidate, rank, ceiling_ptr, row, asked):
    """`best` after a tile of products (Q, C), of which `candidate` counts, and which rows met one not finite.

    Where there is a ceiling, candidates have been found already down to the key that it has for each row.
    """
    finite = tl.abs(products) < float("inf")
    damaged |= tl.max((candidate & (finite == 0)).to(tl.int32), 1) > 0
    scores = tl.where(candidate & finite, products, -float("inf"))
    if ceiling_ptr is not None:
        ceiling = tl.load(ceiling_ptr + row, mask=asked, other=0)
        scores = tl.where(pack(scores, rank[None, :]) < ceiling[:, None], scores, -float("inf"))
    return insert(best, scores, rank), damaged


@triton.jit
def store(
    best, damaged, index_ptr, scores_ptr, last_ptr, ceiling_ptr, row, asked, stride, k, REVERSED: tl.constexpr
):
    """The first k of each row by falling key, NaN as the first score of a damaged row; the key of the last.

    An index is the rank, or REVERSED what is missing from the rank to 2³¹ - 1.
    """
    best = tl.sort(best, 1, descending=True)
    scores, index = unpack(best)
    if REVERSED:
        index = tl.where(index >= 0, index ^ _MAGNITUDE, -1)
    column = tl.arange(0, best.shape[1])[None, :]
    if ceiling_ptr is None:
        scores = tl.where(damaged[:, None] & (column == 0), float("nan"), scores)
    out = row.to(tl.int64)[:, None] * stride + column
    wanted = asked[:, None] & (column < k)
    tl.store(index_ptr + out, index.to(tl.int64), mask=wanted)
    tl.store(scores_ptr + out, scores, mask=wanted)
    if last_ptr is not None:
        tl.store(last_ptr + row, tl.min(best, 1), mask=asked)
