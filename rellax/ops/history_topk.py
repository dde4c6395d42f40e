"""``rellax::history_topk``: for each query the k behaviours of a user's history nearest to a target item."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rellax.ops._check import (
    bad,
    can_read,
    check_count,
    check_embeddings,
    check_index,
    check_range,
    dtype_name,
)
from rellax.ops._register import extension, operator
from rellax.reference import history_topk as reference


def _cpp(
    embeddings: Tensor,
    items: Tensor,
    offsets: Tensor,
    target: Tensor | None,
    user: Tensor | None,
    end: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    embeddings, items, offsets = embeddings.contiguous(), items.contiguous(), offsets.contiguous()
    queries = [None if index is None else index.contiguous() for index in (target, user, end)]
    addresses = [0 if index is None else index.data_ptr() for index in queries]
    rows = len(items if target is None else target)
    positions = items.new_empty((rows, k))
    scores = embeddings.new_empty((rows, k), dtype=torch.float32)
    extension().history_topk(
        embeddings=embeddings.data_ptr(),
        dtype=dtype_name(embeddings.dtype),
        count=embeddings.shape[0],
        dim=embeddings.shape[1],
        items=items.data_ptr(),
        offsets=offsets.data_ptr(),
        users=len(offsets) - 1,
        **dict(zip(_QUERY, addresses, strict=True)),
        queries=rows,
        k=k,
        positions=positions.data_ptr(),
        scores=scores.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return positions, scores


_QUERY = ("target", "user", "end")


def _check_values(
    embeddings: Tensor,
    items: Tensor,
    offsets: Tensor,
    target: Tensor | None,
    user: Tensor | None,
    end: Tensor | None,
    _k: int,
) -> None:
    first, last, falls = int(offsets[0]), int(offsets[-1]), int((offsets.diff() < 0).sum())
    if first != 0 or last != len(items) or falls:
        expected = f"values that rise from 0 to the M = {len(items)} behaviours"
        raise bad("offsets", expected, f"{first} to {last}, falling {falls} times")
    check_range("items", items, embeddings.shape[0], "row of embeddings")
    if target is None or user is None or end is None:
        return
    check_range("target", target, embeddings.shape[0], "row of embeddings")
    check_range("user", user, offsets.shape[0] - 1, "user of offsets")
    length = offsets.diff()[user]
    if (outside := (end < 0) | (end > length)).any():
        q = int(outside.nonzero()[0, 0])
        expected = f"between 0 and the {int(length[q])} behaviours of user {int(user[q])}"
        raise bad("end", expected, f"{int(end[q])} for query {q}")


_forward = operator(
    "history_topk",
    reference.history_topk,
    cpp=_cpp,
    triton="rellax.kernels.history_topk:history_topk",
    check=_check_values,
)


def history_topk(
    embeddings: Tensor,
    items: Tensor,
    offsets: Tensor,
    k: int,
    *,
    target: Tensor | None = None,
    user: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k candidates of each query with the largest dot product with its target (ReLLa's SUBR), exactly.

    The dot product is the cosine where the rows of `embeddings` have unit length. Products and sums are fp32.
    Equal scores: the more recent behaviour first. The C++ kernel gives the same bits for any number of
    threads and on each of its ISA levels, the Triton kernel on every run. No gradients.

    With target, user and end (Q,), query q has the candidates ``items[offsets[user] : offsets[user] + end]``.
    With none of them every behaviour is a target, its candidates those before it of the same user: Q = M.

    Args:
        embeddings: (N, D) fp32, bf16 or fp16.
        items: (M,) int32 or int64, a row of `embeddings` for each behaviour, user by user, in time order.
        offsets: (U + 1,) int32 or int64, where each user's behaviours begin in `items`; the last is M.
        k: how many behaviours a query gets, at least 1.
        target: (Q,) int32 or int64, a row of `embeddings`.
        user: (Q,) int32 or int64, in [0, U).
        end: (Q,) int32 or int64, how many of the user's first behaviours are candidates.

    Returns:
        positions (Q, k) int64 within the user's history, by falling score, and scores (Q, k) fp32; past the
        last candidate -1 and -inf.

    Raises:
        InputError: a shape, dtype or device does not fit, or only some of target, user and end are given.
            On a CPU also: an index is out of range, offsets do not rise from 0 to M, or, outside of
            torch.compile, a score is not finite.
        ValueError: 2^32 queries or more, on a CPU.
    """
    _check_history(embeddings, items, offsets, k)
    if target is not None and user is not None and end is not None:
        _check_queries(embeddings, target, user, end)
        target, user, end = target.long(), user.long(), end.long()
    elif not (target is None and user is None and end is None):
        given = [name for name, index in zip(_QUERY, (target, user, end), strict=True) if index is not None]
        raise bad(", ".join(_QUERY), "all three or none", f"only {' and '.join(given)}")
    positions, scores = _forward(embeddings.detach(), items.long(), offsets.long(), target, user, end, k)
    if can_read(scores) and (damaged := scores[:, 0].isnan()).any():
        raise bad("embeddings", _FINITE, f"a score that is not, in query {int(damaged.nonzero()[0, 0])}")
    return positions, scores


_FINITE = "rows whose dot products are finite in fp32"


@_forward.register_fake
def _fake(embeddings: Tensor, items: Tensor, _offsets: Tensor, target: Tensor | None, *rest: Any) -> Any:
    shape = ((items if target is None else target).shape[0], rest[-1])
    return items.new_empty(shape), embeddings.new_empty(shape, dtype=torch.float32)


def _check_history(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int) -> None:
    check_embeddings(embeddings)
    check_index("items", items, "(M,)", embeddings.device)
    check_index("offsets", offsets, "(U + 1,)", embeddings.device)
    check_count("k", k)
    if offsets.shape[0] == 0:
        raise bad("offsets", "shape (U + 1,), at least (1,)", offsets)


def _check_queries(embeddings: Tensor, target: Tensor, user: Tensor, end: Tensor) -> None:
    for name, index in zip(_QUERY, (target, user, end), strict=True):
        check_index(name, index, "(Q,)", embeddings.device)
        if index.shape != target.shape:
            raise bad(name, f"one for each of the Q = {target.shape[0]} targets", index)
