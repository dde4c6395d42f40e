"""The behaviours of each sample's user that are nearest to the sample's target, among those before it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rellax import ops


def retrieve(
    embeddings: Tensor,
    behaviour_items: np.ndarray,
    offsets: np.ndarray,
    user: np.ndarray,
    position: np.ndarray,
    target: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The k earlier behaviours nearest to each target by dot product: cosine, for rows of unit length.

    Only items are compared. Ratings are no input, and of a user's history only the first `position`
    behaviours are candidates: nothing at the target or after it.

    Args:
        embeddings: (N, D) fp32, bf16 or fp16, a row for each item.
        behaviour_items: (M,) items of all histories, user by user, in time order.
        offsets: (U + 1,) where each user's history begins.
        user: (S,) user of each sample.
        position: (S,) how many behaviours of that user come before the target.
        target: (S,) item of each sample.
        k: how many behaviours a sample gets, at most.

    Returns:
        positions (S, k) int64 within the user's history, by falling similarity, and scores (S, k) float32;
        past the last earlier behaviour -1 and -inf.

    Raises:
        InputError: as :func:`rellax.ops.history_topk`.
    """
    device = embeddings.device
    items, starts, users, ends, targets = (  # copies: arrays out of Parquet are read-only, a tensor is not
        torch.tensor(array, device=device) for array in (behaviour_items, offsets, user, position, target)
    )
    positions, scores = ops.history_topk(embeddings, items, starts, k, target=targets, user=users, end=ends)
    return positions.cpu().numpy(), scores.cpu().numpy()
