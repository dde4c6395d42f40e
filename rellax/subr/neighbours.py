"""The nearest items of every item: exactly, or approximately through faiss, with the recall it reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rellax import ops
from rellax.errors import InputError

METHODS = ("exact", "faiss-hnsw", "faiss-ivf")

_BLOCK = 4096
"""Queries that faiss gets at once: Ctrl-C works between two blocks."""


@dataclass(frozen=True)
class Neighbours:
    """indices (N, k) int64, by falling score, and scores (N, k) fp32; -1 and -inf where nothing was found.

    `recall` is the share of the k nearest items of `sample` random items that was found, counted by index: of
    items with equal scores only those that the exact search takes. Both are None for an exact search.
    """

    indices: Tensor
    scores: Tensor
    recall: float | None = None
    sample: int | None = None


def item_neighbours(
    embeddings: Tensor,
    k: int,
    *,
    method: str = "exact",
    effort: int | None = None,
    sample: int = 1000,
    seed: int = 0,
) -> Neighbours:
    """The k items with the largest dot product with each item, itself excluded.

    Args:
        embeddings: (N, D) fp32, bf16 or fp16.
        k: how many items an item gets, at least 1.
        method: "exact" (:func:`rellax.ops.item_topk`), or one of faiss's indices, on the CPU and over an fp32
            copy of `embeddings`: "faiss-hnsw", a graph of 32 links a node (Malkov and Yashunin, 2018), or
            "faiss-ivf", inverted lists of the clusters of k-means.
        effort: what a query of faiss may cost: efSearch of a graph (default: 4 k, at least 64), nprobe of
            inverted lists (default: a sixteenth of them).
        sample: how many random items the recall of faiss is measured on.
        seed: draws that sample.

    Raises:
        InputError: as :func:`rellax.ops.item_topk`; the method is unknown, or faiss is not installed.
    """
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "exact":
        return Neighbours(*ops.item_topk(embeddings, k))
    faiss = _faiss(method)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(embeddings), generator=generator)[:sample].to(embeddings.device)
    exact, _ = ops.item_topk(embeddings, k, queries=chosen)  # first: it checks the arguments
    indices, scores = _search(faiss, embeddings, k, method, effort)
    indices, scores = indices.to(embeddings.device), scores.to(embeddings.device)
    found = (exact[:, :, None] == indices[chosen][:, None, :]).any(2)
    wanted = exact >= 0
    recall = float((found & wanted).sum() / wanted.sum().clamp_min(1))
    return Neighbours(indices, scores, recall, len(chosen))


def _faiss(method: str) -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError(
            f'method: expected "exact" where faiss is not installed (pip install "rellax[faiss]" does), '
            f"got {method!r}"
        ) from None
    return faiss


def _search(faiss: Any, embeddings: Tensor, k: int, method: str, effort: int | None) -> tuple[Tensor, Tensor]:
    """(N, k) indices and scores from a fresh index."""
    rows = embeddings.detach().float().cpu().contiguous().numpy()
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = _index(faiss, rows, k, method, effort)
    blocks = [_block(index, rows, first, k) for first in range(0, len(rows), _BLOCK)]
    indices, scores = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return indices, scores


def _index(faiss: Any, rows: np.ndarray, k: int, method: str, effort: int | None) -> Any:
    items, dim = rows.shape
    if method == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = effort or max(4 * k, 64)
    else:
        lists = max(min(int(4 * items**0.5), items // 39), 1)  # k-means asks for 39 items a cluster
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = effort or max(lists // 16, 1)
        index.train(rows)
    index.add(rows)
    return index


def _block(index: Any, rows: np.ndarray, first: int, k: int) -> tuple[Tensor, Tensor]:
    """What `index` finds for some rows but the row itself, which may be missing from what it finds."""
    scores, indices = (torch.from_numpy(found) for found in index.search(rows[first : first + _BLOCK], k + 1))
    own = indices == torch.arange(first, first + len(indices))[:, None]
    order = own.int().argsort(dim=1, stable=True)[:, :k]
    indices, scores = indices.gather(1, order), scores.gather(1, order)
    return indices, scores.masked_fill(indices < 0, -torch.inf)
