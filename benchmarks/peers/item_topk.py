"""How the nearest items of items are found today.

A peer takes fp32 rows, the first `queries` of them as queries, and gives (queries, k) indices, the
best first. The query itself may be among them, so k is one more than is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Search = Callable[[Tensor, int, int], Tensor]
_BLOCK = 1024


class FaissFlat:
    """faiss's exact index; filled once, outside of what is timed."""

    def __init__(self, rows: Tensor) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self.index = faiss.IndexFlatIP(rows.shape[1])
        self.index.add(rows.numpy())

    def __call__(self, rows: Tensor, queries: int, k: int) -> Tensor:
        return torch.from_numpy(self.index.search(rows[:queries].numpy(), k)[1])


class ScikitLearn:
    """Its brute force, by Euclidean distance: of rows of unit length the same order, on its fastest path."""

    def __init__(self, rows: Tensor) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.index = NearestNeighbors(algorithm="brute", metric="euclidean").fit(rows.numpy())

    def __call__(self, rows: Tensor, queries: int, k: int) -> Tensor:
        return torch.from_numpy(self.index.kneighbors(rows[:queries].numpy(), k, return_distance=False))


class Torch:
    """A product and topk, block by block."""

    def __init__(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.rows = rows.to(dtype)

    def __call__(self, rows: Tensor, queries: int, k: int) -> Tensor:
        blocks = self.rows[:queries].split(_BLOCK)
        return torch.cat([(block @ self.rows.T).topk(k).indices for block in blocks])


class TorchBFloat16(Torch):
    """The same in bf16, whose result is not exact."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows, torch.bfloat16)
