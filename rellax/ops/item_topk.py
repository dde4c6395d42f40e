"""``rellax::item_topk``: the k nearest items of each item."""

from __future__ import annotations

import torch
from torch import Tensor

from rellax.ops._check import bad, check_count, check_embeddings, check_index, check_range, dtype_name
from rellax.ops._register import extension, operator
from rellax.reference import item_topk as reference


def _cpp(embeddings: Tensor, queries: Tensor | None, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    embeddings = embeddings.contiguous()
    queries = None if queries is None else queries.contiguous()
    rows = len(embeddings) if queries is None else len(queries)
    indices = embeddings.new_empty((rows, k), dtype=torch.int64)
    scores = embeddings.new_empty((rows, k), dtype=torch.float32)
    search = extension().ItemTopk(
        embeddings=embeddings.data_ptr(),
        dtype=dtype_name(embeddings.dtype),
        items=len(embeddings),
        dim=embeddings.shape[1],
        query=0 if queries is None else queries.data_ptr(),
        queries=rows,
        k=k,
        exclude_self=exclude_self,
        indices=indices.data_ptr(),
        scores=scores.data_ptr(),
        threads=torch.get_num_threads(),
    )
    while search.step():  # Python handles signals in between
        pass
    return indices, scores


def _check_values(embeddings: Tensor, queries: Tensor | None, _k: int, _exclude_self: bool) -> None:
    """Raise unless every dot product of two rows is sure to be finite in fp32, and twice of it."""
    if queries is not None:
        check_range("queries", queries, embeddings.shape[0], "row of embeddings")
    if embeddings.numel() == 0:
        return
    low, high = (float(extreme) for extreme in torch.aminmax(embeddings))
    if not 2 * max(low * low, high * high) * embeddings.shape[1] <= torch.finfo(torch.float32).max:
        raise bad("embeddings", "rows whose dot products are finite in fp32", f"values from {low} to {high}")


_forward = operator(
    "item_topk",
    reference.item_topk,
    cpp=_cpp,
    triton="rellax.kernels.item_topk:item_topk",
    check=_check_values,
)


def item_topk(
    embeddings: Tensor, k: int, *, queries: Tensor | None = None, exclude_self: bool = True
) -> tuple[Tensor, Tensor]:
    """The k items with the largest dot product with each query item, exactly.

    The dot product is the cosine where the rows of `embeddings` have unit length. Products and sums are fp32.
    Equal scores: the lower index first. The C++ kernel gives the same bits for any number of threads and on
    each of its ISA levels, and computes each pair once where all items are queries. No gradients.

    The N x N scores are never held at once. Beside its input and output the C++ kernel takes 2 bytes a value
    for its own copy of `embeddings` (4 on ISA levels without bf16) and 12 max(2 k, k + 64) bytes a query:
    2.2 GB for 10^6 x 512 and k = 30, where fp32 `embeddings` are 2 GB. It works in steps of at most some
    seconds, and Ctrl-C stops it after one.

    Args:
        embeddings: (N, D) fp32, bf16 or fp16.
        k: how many items a query gets, at least 1.
        queries: (Q,) int32 or int64, rows of `embeddings`; None: all of them, Q = N.
        exclude_self: leave the query item out of its own result.

    Returns:
        indices (Q, k) int64 into `embeddings`, by falling score, and scores (Q, k) fp32; past the last
        item -1 and -inf.

    Raises:
        InputError: a shape, dtype or device does not fit. On a CPU also: a query is out of range, or
            `embeddings` holds NaN, infinity or values whose dot products may overflow.
    """
    check_embeddings(embeddings)
    check_count("k", k)
    if not isinstance(exclude_self, bool):
        raise bad("exclude_self", "True or False", repr(exclude_self))
    if queries is not None:
        check_index("queries", queries, "(Q,)", embeddings.device)
        queries = queries.long()
    indices, scores = _forward(embeddings.detach(), queries, k, exclude_self)
    return indices, scores


@_forward.register_fake
def _fake(embeddings: Tensor, queries: Tensor | None, k: int, _exclude_self: bool) -> tuple[Tensor, Tensor]:
    shape = (embeddings.shape[0] if queries is None else queries.shape[0], k)
    return embeddings.new_empty(shape, dtype=torch.int64), embeddings.new_empty(shape, dtype=torch.float32)
