"""The behaviours of each sample's user that are nearest to the sample's target, among those before it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from rellax import ops

_BLOCK = 1 << 20  # behaviours, or samples, that are hashed at once


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


def user_keys(user_ids: Iterable[str]) -> np.ndarray:
    """A hash of each user's id, uint64: it stays the same whatever other users there are."""
    digests = (hashlib.blake2b(user_id.encode(), digest_size=8).digest() for user_id in user_ids)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)


def history_keys(
    keys: np.ndarray,
    behaviour_items: np.ndarray,
    offsets: np.ndarray,
    user: np.ndarray,
    position: np.ndarray,
    target: np.ndarray,
) -> np.ndarray:
    """A hash of what each sample's retrieval depends on beside the embeddings: (S,) uint64.

    That is the sample's target and all items before it, in their order; the user's key is mixed in, so that
    equal histories of two users differ. Shapes as in :func:`retrieve`; `keys` (U,) are the users'.
    """
    sums = np.zeros(len(behaviour_items) + 1, np.uint64)
    bounds = np.unique(np.searchsorted(offsets, range(0, len(behaviour_items), _BLOCK)))
    for first, last in itertools.pairwise([*bounds, len(offsets) - 1]):
        rows = np.arange(offsets[first], offsets[last])
        rank = rows - np.repeat(offsets[first:last], np.diff(offsets[first : last + 1]))
        sums[rows + 1] = _mixed(rank, behaviour_items[rows])
    np.cumsum(sums, out=sums)
    hashes = np.empty(len(user), np.uint64)
    for at in range(0, len(user), _BLOCK):
        block = slice(at, at + _BLOCK)
        start = offsets[user[block]]
        before = sums[start + position[block]] - sums[start]
        hashes[block] = _mix(_mix(before + keys[user[block]]) + _mixed(position[block], target[block]))
    return hashes


def _mixed(rank: np.ndarray, items: np.ndarray) -> np.ndarray:
    return _mix((rank.astype(np.uint64) << np.uint64(32)) | items.astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection in which every bit matters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
