"""The nearest earlier behaviours in plain PyTorch: the specification of ``rellax::history_topk``.

    score(q, p) = <embeddings[target_q], embeddings[items[offsets[user_q] + p]]>        0 <= p < end_q

Without target, user and end every behaviour is a target, and those before it of its user are its candidates.
Positions by falling score, equal scores by falling position: the more recent behaviour first. Products run in
fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.reference._numerics import accumulation_dtype

_BLOCK_SCORES = 1 << 22
"""Scores held at once."""


def history_topk(
    embeddings: Tensor,
    items: Tensor,
    offsets: Tensor,
    target: Tensor | None,
    user: Tensor | None,
    end: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """positions (Q, k), -1 past the last candidate, and scores (Q, k), -inf there.

    The first score of a query is NaN where the score of any of its candidates is not finite.
    """
    target = items if target is None else target
    positions = target.new_empty((target.shape[0], k))
    scores = embeddings.new_empty((target.shape[0], k), dtype=accumulation_dtype(embeddings.dtype))
    starts = offsets.tolist()
    for u, queries in _queries_of_users(starts, user, items.device):
        ends = queries - starts[u] if end is None else end[queries]
        history = items[starts[u] : starts[u] + int(ends.max())]
        # One score an item, not a behaviour: the same item twice must tie, however the product's edges round.
        distinct, occurrence = history.unique(return_inverse=True)
        rows = embeddings[distinct].to(scores.dtype)
        size = max(_BLOCK_SCORES // max(len(history), 1), 1)
        for block, block_ends in zip(queries.split(size), ends.split(size), strict=True):
            products = embeddings[target[block]].to(scores.dtype) @ rows.mT
            positions[block], scores[block] = _best(products[:, occurrence], block_ends, k)
    return positions, scores


def _queries_of_users(
    starts: list[int], user: Tensor | None, device: torch.device
) -> Iterable[tuple[int, Tensor]]:
    """Each user that has queries, and which they are."""
    if user is None:
        spans = enumerate(itertools.pairwise(starts))
        return ((u, torch.arange(first, last, device=device)) for u, (first, last) in spans if first < last)
    users, counts = user.unique(return_counts=True)
    return zip(users.tolist(), user.argsort(stable=True).split(counts.tolist()), strict=True)


def _best(scores: Tensor, end: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of scores (Q, H), of which the first `end` columns of each row are candidates."""
    length = scores.shape[1]
    scores = scores.masked_fill(~scores.isfinite(), math.nan)
    scores = scores.masked_fill(torch.arange(length, device=end.device) >= end[:, None], -math.inf)
    # From the most recent to the oldest, which a stable sort keeps among equals; it puts NaN before all.
    scores, order = scores.flip(-1).sort(dim=-1, descending=True, stable=True)
    scores = F.pad(scores[:, :k], (0, max(k - length, 0)), value=-math.inf)
    positions = F.pad(length - 1 - order[:, :k], (0, max(k - length, 0)), value=-1)
    return positions.masked_fill(scores == -math.inf, -1), scores
