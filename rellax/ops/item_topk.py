"""``rellax::item_topk``: the k nearest items of each item."""

from __future__ import annotations

import torch
from torch import Tensor

from rellax.ops._check import bad, can_read, check_embeddings, check_index, check_range
from rellax.ops._register import operator
from rellax.reference import item_topk as reference

_forward = operator("item_topk", reference.item_topk, triton="rellax.kernels.item_topk:item_topk")


def item_topk(
    embeddings: Tensor, k: int, *, queries: Tensor | None = None, exclude_self: bool = True
) -> tuple[Tensor, Tensor]:
    """The k items with the largest dot product with each query item, exactly.

    The dot product is the cosine where the rows of `embeddings` have unit length. Products and sums are fp32.
    Equal scores: the lower index first. The N x N scores are never held at once. No gradients.

    Args:
        embeddings: (N, D) fp32, bf16 or fp16.
        k: how many items a query gets, at least 1.
        queries: (Q,) int32 or int64, rows of `embeddings`; None: all of them, Q = N.
        exclude_self: leave the query item out of its own result.

    Returns:
        indices (Q, k) int64 into `embeddings`, by falling score, and scores (Q, k) fp32; past the last
        item -1 and -inf.

    Raises:
        InputError: a shape, dtype or device does not fit. On a CPU, outside of torch.compile, also: a query
            is out of range, or `embeddings` holds NaN, infinity or values whose dot products may overflow.
    """
    check_embeddings(embeddings)
    if k < 1:
        raise bad("k", "at least 1", k)
    if queries is None:
        queries = torch.arange(embeddings.shape[0], device=embeddings.device)
    check_index("queries", queries, "(Q,)", embeddings.device)
    if can_read(embeddings):
        check_range("queries", queries, embeddings.shape[0], "row of embeddings")
        _check_finite(embeddings)
    indices, scores = _forward(embeddings.detach(), queries.long(), k, exclude_self)
    return indices, scores


@_forward.register_fake
def _fake(embeddings: Tensor, queries: Tensor, k: int, _exclude_self: bool) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), embeddings.new_empty(shape, dtype=torch.float32)


def _check_finite(embeddings: Tensor) -> None:
    """Raise unless every dot product of two rows is sure to be finite in fp32."""
    if embeddings.numel() == 0:
        return
    low, high = (float(extreme) for extreme in torch.aminmax(embeddings))
    if not max(low * low, high * high) * embeddings.shape[1] <= torch.finfo(torch.float32).max:
        raise bad("embeddings", "rows whose dot products are finite in fp32", f"values from {low} to {high}")
