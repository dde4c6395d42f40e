"""The nearest items of items on a GPU: one program for a block of queries, which all items pass by in tiles.

    fp32    halves    the table, scaled and rounded to fp16, and how far its products can be from the true
            search    in fp16, with more results than asked for
            rescore   these in fp32; a row is certain where its last wanted score is further above the worst
                      result of the search than the error can be: nothing better was left out
            search    the other rows again, to fp32's precision
    else    search    products of half precision numbers are exact in fp32 as they are

The host waits once, for the number of the other rows. A search keeps the best of each query on chip, and no
score besides; more results than fit take several passes, each below the last result of the one before.
``rellax.reference.item_topk`` is the specification.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.kernels._build import Build, meta, record
from rellax.kernels._host import cdiv, rows_of
from rellax.kernels._topk import (
    LIMIT,
    Blocks,
    blocks,
    consider,
    dot_rows,
    nothing,
    pack,
    precision,
    store,
    unpack,
)
from rellax.kernels._tuning import Tuned

_QUERIES = 64  # of a block
# Candidates of a tile, each of which reads the queries anew: as many as registers hold.
_WIDE = Tuned("item_topk", {"BLOCK_C": 128}, sm_90={"BLOCK_C": 256})
_SPARE = 16  # results of an fp16 search beyond those asked for, at least
_FOUND = 64  # results of an fp16 search, at most
_CHUNK = 2**18  # queries of an fp16 search, whose results are held at once
_ROWS = 2**16  # of the table, that are rounded at once
_INDEX = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["asked", "k", "stride_out"])
def _search_kernel(
    table_ptr,
    queries_ptr,
    ceiling_ptr,
    last_ptr,
    indices_ptr,
    scores_ptr,
    rows,
    asked,
    d,
    k,
    stride_table,
    stride_out,
    EXCLUDE_SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = tl.load(queries_ptr + row, mask=row < asked, other=-1)
    query = tl.where((query >= 0) & (query < rows), query, -1).to(tl.int32)
    damaged = query < 0
    best = nothing(BLOCK_Q, BLOCK_K)
    for start in range(0, rows, BLOCK_C):
        index = start + tl.arange(0, BLOCK_C)
        products = dot_rows(table_ptr, query, index, rows, d, stride_table, PRECISION, BLOCK_D)
        candidate = (index < rows)[None, :] & (row < asked)[:, None]
        if EXCLUDE_SELF:
            candidate &= index[None, :] != query[:, None]
        rank = index ^ _INDEX  # the lower index first
        best, damaged = consider(best, damaged, products, candidate, rank, ceiling_ptr, row, row < asked)
    store(
        best, damaged, indices_ptr, scores_ptr, last_ptr, ceiling_ptr, row, row < asked, stride_out, k,
        REVERSED=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["k"])
def _rescore_kernel(
    table_ptr,
    queries_ptr,
    found_ptr,
    approximate_ptr,
    unit_ptr,
    error_ptr,
    indices_ptr,
    scores_ptr,
    open_ptr,
    rows,
    d,
    k,
    stride_table,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The true scores of the `found` of one query, the best k of them, and whether the row stays open."""
    row = tl.program_id(0).to(tl.int64)
    query = tl.load(queries_ptr + row)
    exists = (query >= 0) & (query < rows)
    place = row * BLOCK_K + tl.arange(0, BLOCK_K)
    index, approximate = tl.load(found_ptr + place), tl.load(approximate_ptr + place)
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = exists & (column < d)
        a = tl.load(table_ptr + query * stride_table + column, mask=inside, other=0.0)
        known = (index >= 0)[:, None] & inside[None, :]
        b = tl.load(table_ptr + index[:, None] * stride_table + column[None, :], mask=known, other=0.0)
        sums += a[None, :] * b
    scores = tl.sum(sums, 1)
    finite = (tl.abs(scores) < float("inf")) & (approximate == approximate)
    best = nothing(1, BLOCK_K)
    keys = pack(scores, index.to(tl.int32) ^ _INDEX)[None, :]
    best = tl.sort(tl.where((finite & (index >= 0))[None, :], keys, best), 1, descending=True)
    scores, index_best = unpack(best)
    column = tl.arange(0, BLOCK_K)[None, :]
    last = tl.sum(tl.sum(tl.where(column == k - 1, scores, 0.0), 1), 0)
    error = tl.load(error_ptr + query, mask=exists, other=float("inf"))
    above = last * tl.load(unit_ptr) - tl.min(approximate, 0)
    everything = tl.min(index, 0) < 0
    certain = exists & (tl.min(finite.to(tl.int32), 0) > 0) & (everything | (above > error))
    tl.store(open_ptr + row, (certain == 0).to(tl.int8))
    index_best = tl.where(index_best >= 0, index_best ^ _INDEX, -1).to(tl.int64)
    tl.store(indices_ptr + row * k + column, index_best, mask=column < k)
    tl.store(scores_ptr + row * k + column, scores, mask=column < k)


def item_topk(
    embeddings: Tensor, queries: Tensor | None, k: int, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """As ``rellax.reference.item_topk.item_topk``, for fp32, bf16 and fp16.

    The first score of a query is NaN where it does not exist, or where a candidate's score is not finite.
    """
    table = rows_of(embeddings)
    every = torch.arange(len(table), device=table.device) if queries is None else queries
    queries = every.contiguous()
    if table.dtype != torch.float32 or k + _SPARE > _FOUND or table.numel() == 0:
        return _search(table, queries, k, exclude_self)
    halves, unit, error = _halves(table)
    indices = queries.new_empty((len(queries), k))
    scores = table.new_empty((len(queries), k))
    still_open = queries.new_empty(len(queries), dtype=torch.int8)
    for start in range(0, len(queries), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        found, approximate = _search(halves, queries[chunk], _FOUND, exclude_self, _fp16_blocks(halves))
        outputs = (indices[chunk], scores[chunk], still_open[chunk])
        _rescore(table, queries[chunk], found, approximate, unit, error, outputs)
    again = still_open.nonzero().flatten()
    if len(again):
        indices[again], scores[again] = _search(table, queries[again], k, exclude_self)
    return indices, scores


def _halves(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The table times a power of two in fp16, that power squared, and each row's error (N,).

    The error bounds by how much the fp16 product of a row with any other can differ from the scaled fp32 one,
    by Cauchy and Schwarz: <a, b> - <a', b'> = <a - a', b> + <a', b - b'>, and the rounding of the sums. Rows
    that are not finite don't count: their products show it.
    """
    n, d = table.shape
    low, high = torch.aminmax(table)
    scale = torch.ldexp(torch.ones_like(high), -torch.frexp(torch.maximum(-low, high)).exponent)
    halves = torch.empty_like(table, dtype=torch.float16, memory_format=torch.contiguous_format)
    norm, residual = table.new_empty((2, n))
    for rows in (slice(start, start + _ROWS) for start in range(0, n, _ROWS)):
        scaled = table[rows] * scale
        halves[rows] = scaled.half()
        torch.linalg.vector_norm(scaled, dim=1, out=norm[rows])
        torch.linalg.vector_norm(scaled - halves[rows].float(), dim=1, out=residual[rows])
    finite = norm.isfinite()
    norm, residual = norm.where(finite, 0.0), residual.where(finite, 0.0)
    unit, length, most = scale * scale, norm + residual, residual.max()
    longest = norm.max() + most
    error = residual * longest + length * most + d * 2.0**-22 * length * longest
    overflows = length * longest / unit >= 1e38
    return halves, unit, (error * (1 + 2.0**-10)).masked_fill(overflows, torch.inf)


def _blocks(k: int, table: Tensor) -> Blocks:
    if torch.version.hip is None and table.itemsize == 2 and k <= 32:
        return Blocks(_QUERIES, _WIDE.on(table.device)["BLOCK_C"], 64, 32, 8, 3)
    return blocks(_QUERIES, k, table)


def _fp16_blocks(halves: Tensor) -> Blocks:
    if torch.version.hip is not None:
        return blocks(_QUERIES, _FOUND, halves)
    return Blocks(64, 128, 64, _FOUND, 8, 3)


def _rescore(
    table: Tensor,
    queries: Tensor,
    found: Tensor,
    approximate: Tensor,
    unit: Tensor,
    error: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes indices, scores (Q, k) and which rows stay open (Q,) into `outputs`."""
    if len(queries) == 0:
        return
    with torch.cuda.device_of(table):
        _rescore_kernel[(len(queries),)](
            table,
            queries,
            found,
            approximate,
            unit,
            error,
            *outputs,
            len(table),
            table.shape[1],
            outputs[0].shape[1],
            table.stride(0),
            BLOCK_K=_FOUND,
            BLOCK_D=64,
            num_warps=4,
        )


def _search(
    table: Tensor, queries: Tensor, k: int, exclude_self: bool, tiling: Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """The best k by products in the table's dtype."""
    indices = queries.new_empty((len(queries), k))
    scores = table.new_empty((len(queries), k), dtype=torch.float32)
    if len(queries) == 0:
        return indices, scores
    tiling = tiling or _blocks(k, table)
    last = queries.new_empty(len(queries)) if k > LIMIT else None
    ceiling = None
    with torch.cuda.device_of(table):
        for first in range(0, k, LIMIT):
            _search_kernel[(cdiv(len(queries), tiling.BLOCK_Q),)](
                table,
                queries,
                ceiling,
                last,
                indices[:, first:],
                scores[:, first:],
                len(table),
                len(queries),
                table.shape[1],
                min(k - first, LIMIT),
                table.stride(0),
                k,
                EXCLUDE_SELF=exclude_self,
                PRECISION=precision(table),
                **tiling._asdict(),
            )
            ceiling = last
    return indices, scores


def builds() -> Iterator[Build]:
    """All dtypes and blocks, and more results than one pass keeps. bf16 compiles as fp16 does."""
    halves, table = meta(4096, 512, dtype=torch.float16), meta(4096, 512)
    queries = meta(4096, dtype=torch.int64)
    launches: dict[str, Callable[[], object]] = {
        f"item {x.dtype} k={k}": functools.partial(_search, x, queries, k, True)
        for x, k in itertools.product((halves, table), (30, 64, LIMIT, 2 * LIMIT))
    }
    wide = launches["item torch.float16 k=30"]
    launches["item fp16 of fp32"] = lambda: _search(halves, queries, _FOUND, True, _fp16_blocks(halves))
    found, approximate = meta(4096, _FOUND, dtype=torch.int64), meta(4096, _FOUND)
    outputs = (meta(4096, 30, dtype=torch.int64), meta(4096, 30), meta(4096, dtype=torch.int8))
    launches["item of fp32"] = functools.partial(
        _rescore, table, queries, found, approximate, meta(), meta(4096), outputs
    )
    for backend, (case, launch) in itertools.product(("cuda", "hip", "sm_89"), launches.items()):
        yield list(record(case, launch, backend))[-1]
    for architecture in _WIDE.architectures:
        yield list(record("item float16 k=30", wide, architecture))[-1]
