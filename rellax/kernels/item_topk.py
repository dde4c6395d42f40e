"""The nearest items of items on a GPU: one program for a block of queries, which all items pass by in tiles.

    fp32    halves    the table, scaled and rounded to fp16, and how far its products can be from the true ones
            search    in fp16, with more results than asked for
            rescore   these in fp32; a row is certain where its last wanted score is further above the worst
                      result of the search than the error can be: nothing better was left out
            search    the other rows again, in fp32
    else    search    products of half precision numbers are exact in fp32 as they are

The host waits once, for the number of the other rows. A search keeps the best of each query on chip, and no
score besides; more results than fit take several passes, each below the last result of the one before.
``rellax.reference.item_topk`` is the specification.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.kernels._build import Build, record
from rellax.kernels._topk import LIMIT, blocks, consider, dot_rows, nothing, precision, rows_of, store

_QUERIES = 64  # of a block
_SPARE = 16  # results of an fp16 search beyond those asked for, at least
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


def item_topk(embeddings: Tensor, queries: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """As ``rellax.reference.item_topk.item_topk``, for fp32, bf16 and fp16.

    The first score of a query is NaN where it does not exist, or where the score of any candidate is not finite.
    """
    table = rows_of(embeddings)
    return _search(table, queries.contiguous(), k, exclude_self)


def _search(table: Tensor, queries: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """The best k by products in the table's dtype."""
    indices = queries.new_empty((len(queries), k))
    scores = table.new_empty((len(queries), k), dtype=torch.float32)
    tiling = blocks(_QUERIES, k, table.itemsize)
    last = queries.new_empty(len(queries)) if k > LIMIT else None
    ceiling = None
    if len(queries) == 0:
        return indices, scores
    with torch.cuda.device_of(table):
        for first in range(0, k, LIMIT):
            _search_kernel[(triton.cdiv(len(queries), tiling.queries),)](
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
                **tiling.keywords(),
            )
            ceiling = last
    return indices, scores


def builds() -> Iterator[Build]:
    """All dtypes and blocks, and more results than one pass keeps. bf16 compiles as fp16 does."""
    dtypes, results = (torch.float16, torch.float32), (30, 64, LIMIT, 2 * LIMIT)
    for backend, dtype, k in itertools.product(("cuda", "hip"), dtypes, results):
        case = f"{dtype} k={k}".removeprefix("torch.")
        table = torch.empty((4096, 512), dtype=dtype, device="meta")
        queries = torch.empty(4096, dtype=torch.int64, device="meta")
        launch = functools.partial(_search, table, queries, k, True)
        yield list(record(f"item {case}", launch, backend))[-1]
