"""How users find the behaviours nearest to a target item today: positions (Q, k), -1 past the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def published_loop(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor) -> Tensor:
    """As published for the large data sets: sample by sample, gather the history's rows, multiply, topk."""
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


class NeighbourLists:
    """As published for the small data sets: along the target's list of all items by falling similarity, until
    k of them turn up in the history. The lists are made beforehand and cost nothing here.

    Args:
        container: what an item is looked up in: `list`, as a sample carries its history, or `set`.
    """

    def __init__(self, embeddings: Tensor, container: type[list[int]] | type[set[int]]) -> None:
        self.lists = (embeddings @ embeddings.T).argsort(dim=1, descending=True).tolist()
        self.container = container

    def __call__(
        self, embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, *queries: Tensor
    ) -> Tensor:
        found = []
        for target, history in _samples(items, offsets, queries):
            behaviours = history.tolist()
            known = self.container(behaviours)
            nearest: list[int] = []
            for item in self.lists[target]:
                if item in known:
                    nearest.append(behaviours.index(item))
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


def _samples(items: Tensor, offsets: Tensor, queries: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor]]:
    starts = offsets.tolist()
    for target, user, end in zip(*(query.tolist() for query in queries), strict=True):
        yield target, items[starts[user] : starts[user] + end]


def _padded(found: list[Tensor], k: int) -> Tensor:
    return torch.stack([F.pad(positions, (0, k - len(positions)), value=-1) for positions in found])
