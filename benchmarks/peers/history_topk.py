"""How users find the behaviours nearest to a target item today: positions (Q, k), -1 past the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def published_loop(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor) -> Tensor:
    """ReLLa's way for the large data sets, sample by sample in NumPy: the history's rows times the target's,
    sums of the products, all of them sorted. What it reads and writes, data frames and files, is left out.
    """
    rows, behaviours = embeddings.numpy(), items.numpy()
    found = []
    for target, history in _samples(behaviours, offsets, queries):
        scores = np.sum(rows[history] * rows[target], axis=-1)
        found.append(torch.from_numpy(np.argsort(-scores)[:k]))
    return _padded(found, k)


def torch_loop(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor) -> Tensor:
    """The same in torch: gather the history's rows, multiply, topk."""
    found = []
    for target, history in _samples(items, offsets, queries):
        scores = embeddings[history] @ embeddings[target]
        found.append(scores.topk(min(k, len(history))).indices)
    return _padded(found, k)


def per_user_torch(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor) -> Tensor:
    """Where every behaviour is a target: one product for a user, later behaviours masked, topk."""
    found = []
    for history in items.tensor_split(offsets[1:-1].cpu()):
        rows = embeddings[history]
        later = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).triu()
        best = (rows @ rows.T).masked_fill_(later, -torch.inf).topk(min(k, len(rows)))
        positions = best.indices.masked_fill_(best.values == -torch.inf, -1)
        found.append(F.pad(positions, (0, k - positions.shape[1]), value=-1))
    return torch.cat(found)


class NeighbourWalk:
    """ReLLa's way for the small data sets: along the target's row of all items by falling similarity, until k
    of them turn up in a dictionary of the history. The rows are made beforehand and cost nothing here.

    Args:
        published: rows are NumPy's, the dictionary's keys are items as text, as histories hold them already;
            else both are Python's integers.
    """

    def __init__(self, embeddings: Tensor, items: Tensor, *, published: bool) -> None:
        rows = (embeddings @ embeddings.T).argsort(dim=1, descending=True)
        self.published = published
        self.rows: Any = rows.numpy() if published else rows.tolist()
        self.behaviours: Any = [str(item) for item in items.tolist()] if published else items.tolist()

    def __call__(
        self, embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor
    ) -> Tensor:
        found = []
        for target, history in _samples(self.behaviours, offsets, queries):
            position_of = {item: position for position, item in enumerate(history)}
            row = self.rows[target]
            nearest: list[int] = []
            for item in map(str, row) if self.published else row:
                if item in position_of:
                    nearest.append(position_of[item])
                    if len(nearest) == k:
                        break
            found.append(torch.tensor(nearest, dtype=torch.long))
        return _padded(found, k)


def gather_faiss_knn(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor) -> Tensor:
    """Sample by sample: the history's rows, then faiss's brute force."""
    import faiss

    found = []
    for target, history in _samples(items, offsets, queries):
        rows, query = embeddings[history].numpy(), embeddings[target].numpy()[None]
        _, nearest = faiss.knn(query, rows, min(k, len(rows)), faiss.METRIC_INNER_PRODUCT)
        found.append(torch.from_numpy(nearest[0]))
    return _padded(found, k)


def faiss_selector(embeddings: Tensor) -> Callable[..., Tensor]:
    """Sample by sample: an index of all items, made beforehand, and the history's items as its selector."""
    import faiss

    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.numpy())

    def search(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor) -> Tensor:
        found = []
        for target, history in _samples(items, offsets, queries):
            selector = faiss.SearchParameters(sel=faiss.IDSelectorBatch(history.numpy()))
            _, nearest = index.search(embeddings[target].numpy()[None], min(k, len(history)), params=selector)
            found.append((history == torch.from_numpy(nearest[0])[:, None]).int().argmax(1))
        return _padded(found, k)

    return search


def _samples(behaviours: Any, offsets: Tensor, queries: tuple[Tensor, ...]) -> Iterator[tuple[int, Any]]:
    """Each sample's target, and its part of all users' behaviours."""
    starts = offsets.tolist()
    for target, user, end in zip(*(query.tolist() for query in queries), strict=True):
        yield target, behaviours[starts[user] : starts[user] + end]


def _padded(found: list[Tensor], k: int) -> Tensor:
    return torch.stack([F.pad(positions, (0, k - len(positions)), value=-1) for positions in found])
