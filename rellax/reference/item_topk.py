"""The nearest items of items in plain PyTorch: the specification of ``rellax::item_topk``.

    score(q, j) = <embeddings[q], embeddings[j]>

Indices by falling score, equal scores by rising index. Products run in fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.reference._numerics import accumulation_dtype

_BLOCK_SCORES = 1 << 22
"""Scores held at once."""


def item_topk(
    embeddings: Tensor, queries: Tensor | None, k: int, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """indices (Q, k), -1 past the last item, and scores (Q, k), -inf there; without `queries` Q = N."""
    items = embeddings.shape[0]
    if queries is None:
        queries = torch.arange(items, device=embeddings.device)
    table = embeddings.to(accumulation_dtype(embeddings.dtype))
    indices = queries.new_empty((queries.shape[0], k))
    scores = table.new_empty((queries.shape[0], k))
    block = max(_BLOCK_SCORES // max(items, 1), 1)
    for rows in (slice(start, start + block) for start in range(0, queries.shape[0], block)):
        query = queries[rows]
        products = table[query] @ table.mT
        if exclude_self:
            products.scatter_(1, query[:, None], -math.inf)
        best, values = _best(products, min(k, items))
        indices[rows] = F.pad(best, (0, max(k - items, 0)), value=-1)
        scores[rows] = F.pad(values, (0, max(k - items, 0)), value=-math.inf)
    return indices.masked_fill_(scores == -math.inf, -1), scores


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row; among columns equal to the k-th best, the first ones.

    ``topk`` alone leaves open which of the equal ones it takes; a stable sort of whole rows is much slower.
    """
    kth = scores.topk(k, dim=-1).values[:, -1:]
    above, equal = scores > kth, scores == kth
    chosen = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    index = chosen.nonzero()[:, 1].view(-1, k)
    values, order = scores.gather(1, index).sort(dim=-1, descending=True, stable=True)
    return index.gather(1, order), values
