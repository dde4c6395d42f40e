"""The nearest earlier behaviours on a GPU: one program for a block of queries of one user.

    queries     sorted by user and end, cut into blocks of one user's, the longest first
    search      a block against its user's behaviours, tile by tile: <target, behaviour> on the tensor cores;
                what beats the worst of a query's best so far takes its place, on chip; no score is kept

More results than fit on chip take several passes, each below the last result of the one before. Nothing
waits for the device: the host knows how many blocks there can be at most; those not needed end at once.
``rellax.reference.history_topk`` is the specification.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.kernels._build import Build, meta, record
from rellax.kernels._host import rows_of
from rellax.kernels._tiles import tile_table, tile_tokens
from rellax.kernels._topk import LIMIT, Blocks, blocks, consider, dot_rows, nothing, precision, store


@triton.jit(do_not_specialize=["users", "behaviours", "k", "stride_out"])
def _search_kernel(
    table_ptr,
    items_ptr,
    offsets_ptr,
    target_ptr,
    end_ptr,
    order_ptr,
    starts_ptr,
    tiles_ptr,
    launch_ptr,
    ceiling_ptr,
    last_ptr,
    positions_ptr,
    scores_ptr,
    rows,
    users,
    behaviours,
    d,
    k,
    stride_table,
    stride_out,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.load(launch_ptr + tl.program_id(0))
    user = tl.load(tiles_ptr + users + 1 + block)
    if user == users:
        return
    first = tl.load(starts_ptr + user) + (block - tl.load(tiles_ptr + user)) * BLOCK_Q
    asked = tl.minimum(tl.load(starts_ptr + user + 1) - first, BLOCK_Q).to(tl.int32)
    row = tl.arange(0, BLOCK_Q)
    query = tl.load(order_ptr + first + row, mask=row < asked, other=0)
    target = tl.load(target_ptr + query, mask=row < asked, other=-1)
    history, after = tl.load(offsets_ptr + user), tl.load(offsets_ptr + user + 1)
    end = tl.load(end_ptr + query, mask=row < asked, other=0)
    damaged = (end < 0) | (end > after - history)
    end = tl.minimum(tl.maximum(end, 0), after - history).to(tl.int32)
    longest = tl.max(end, 0)
    best = nothing(BLOCK_Q, BLOCK_K)
    for start in range(0, longest, BLOCK_C):
        position = start + tl.arange(0, BLOCK_C)
        inside = (position < longest) & (history + position < behaviours)
        item = tl.load(items_ptr + history + position, mask=inside, other=-1)
        products = dot_rows(table_ptr, target, item, rows, d, stride_table, PRECISION, BLOCK_D)
        candidate = position[None, :] < end[:, None]
        best, damaged = consider(
            best, damaged, products, candidate, position, ceiling_ptr, query, row < asked
        )
    query = tl.load(order_ptr + first + row, mask=row < asked, other=0)
    store(
        best, damaged, positions_ptr, scores_ptr, last_ptr, ceiling_ptr, query, row < asked, stride_out, k,
        REVERSED=False,
    )  # fmt: skip


def history_topk(
    embeddings: Tensor,
    items: Tensor,
    offsets: Tensor,
    target: Tensor | None,
    user: Tensor | None,
    end: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """As ``rellax.reference.history_topk.history_topk``, for fp32, bf16 and fp16.

    A query whose user does not exist, or whose end is not in its history, has NaN as its first score too.
    """
    if target is None or user is None or end is None:
        target, user, end = _every_behaviour(items, offsets)
    queries, users = len(target), len(offsets) - 1
    positions = target.new_full((queries, k), -1)
    scores = embeddings.new_full((queries, k), float("nan"), dtype=torch.float32)
    if queries == 0 or users == 0:
        return positions, scores
    table = rows_of(embeddings)
    tiling = _blocks(queries, users, k, table)
    order, starts, tiles, launch = _work(user, end, users, len(items), tiling.BLOCK_Q)
    last = target.new_empty(queries) if k > LIMIT else None
    ceiling = None
    with torch.cuda.device_of(table):
        for first in range(0, k, LIMIT):
            _search_kernel[(len(launch),)](
                table,
                items.contiguous(),
                offsets.contiguous(),
                target.contiguous(),
                end.contiguous(),
                order,
                starts,
                tiles,
                launch,
                ceiling,
                last,
                positions[:, first:],
                scores[:, first:],
                len(table),
                users,
                len(items),
                table.shape[1],
                min(k - first, LIMIT),
                table.stride(0),
                k,
                PRECISION=precision(table),
                **tiling._asdict(),
            )
            ceiling = last
    return positions, scores


def _every_behaviour(items: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(target, user, end) of the queries where every behaviour is the target once."""
    users = torch.arange(len(offsets) - 1, device=offsets.device)
    user = users.repeat_interleave(offsets.diff(), output_size=len(items))
    return items, user, torch.arange(len(items), device=items.device) - offsets[user]


def _work(
    user: Tensor, end: Tensor, users: int, behaviours: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which queries each program takes.

    Returns:
        The queries in the order of user and end (Q,); where each user's begin in it (U + 1,); their blocks of
        `size`, as ``tile_table`` has them; the blocks by falling length.
    """
    queries = len(user)
    order = (user * (behaviours + 1) + end.clamp(0, behaviours)).argsort(stable=True)
    starts = torch.searchsorted(user[order], torch.arange(users + 1, device=user.device))
    tiles = tile_table(starts, queries, size)
    before, tile_user = tiles[: users + 1], tiles[users + 1 :]
    known = tile_user.clamp(max=users - 1)
    tile = torch.arange(1, len(tile_user) + 1, device=user.device)
    stop = torch.minimum(starts[known] + (tile - before[known]) * size, starts[known + 1])
    length = end[order[(stop - 1).clamp(min=0)]].masked_fill(tile_user == users, -1)
    return order, starts, tiles, length.argsort(descending=True, stable=True)


def _blocks(queries: int, users: int, k: int, table: Tensor) -> Blocks:
    return blocks(tile_tokens(queries, users), k, table)


def builds() -> Iterator[Build]:
    """All dtypes and blocks, and more results than one pass keeps. fp16 compiles as bf16 does."""
    sizes = ((30, 8), (30, 4096), (64, 8), (64, 4096), (LIMIT, 8), (2 * LIMIT, 8))
    for backend, dtype, (k, queries) in itertools.product(
        ("cuda", "hip", "sm_89"), (torch.bfloat16, torch.float32), sizes
    ):
        case = f"history {dtype} k={k} Q={queries}"
        yield list(record(case, functools.partial(_launch_all, dtype, k, queries), backend))[-1]


def _launch_all(dtype: torch.dtype, k: int, queries: int) -> None:
    items, offsets, query = (meta(n, dtype=torch.int64) for n in (4096, 9, queries))
    history_topk(meta(4096, 512, dtype=dtype), items, offsets, query, query, query, k)
