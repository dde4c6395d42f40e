"""Principal components of the items' embeddings, in fp64, in one pass over blocks that come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.errors import InputError

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class PCA:
    """The leading principal components of a set of rows.

    Attributes:
        mean: (d,) fp64.
        components: (D, d) fp64, orthonormal rows by falling variance. In each the entry of largest magnitude
            is positive, which fixes the sign that the mathematics leaves open.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def fit(cls, x: Tensor | Iterable[Tensor], dim: int) -> PCA:
        """The min(dim, N - 1, d) leading components of N rows: once centred, they span no more directions.

        The covariance is merged block by block (Chan, Golub and LeVeque, 1979), in one pass; beyond a block
        of rows only it is held.

        Args:
            x: floating (N, d), or an iterable of blocks (n, d) whose rows are N together.
            dim: how many components, at most.

        Raises:
            InputError: fewer than two rows, rows of other shapes, values that are not finite; or dim < 1.
        """
        if dim < 1:
            raise InputError(f"dim: expected at least 1, got {dim}")
        rows, mean, scatter = 0, torch.zeros(()), torch.zeros(())
        for whole in [x] if isinstance(x, Tensor) else x:
            if whole.dim() != 2 or not whole.is_floating_point() or (rows and whole.shape[1] != len(mean)):
                expected = f"(N, {len(mean)})" if rows else "(N, d)"
                raise InputError(f"x: expected floating {expected}, got {tuple(whole.shape)} {whole.dtype}")
            for block in map(Tensor.double, whole.split(_BLOCK_ROWS) if len(whole) else ()):
                if not rows:
                    mean, scatter = block.new_zeros(block.shape[1]), block.new_zeros((block.shape[1],) * 2)
                block_mean = block.mean(0)
                centred, shift = block - block_mean, block_mean - mean
                total = rows + len(block)
                scatter.addmm_(centred.mT, centred)
                scatter.addr_(shift, shift, alpha=rows * len(block) / total)
                mean, rows = mean + shift * (len(block) / total), total
        if rows < 2:
            raise InputError(f"x: expected floating (N, d) with at least 2 rows, got {rows}")
        if not mean.isfinite().all():
            raise InputError("x: expected finite values, got NaN or infinity")
        _, vectors = torch.linalg.eigh(scatter)
        components = vectors.mT.flip(0)[: min(dim, rows - 1)]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return cls(mean, components * largest.sign())

    def project(self, x: Tensor) -> Tensor:
        """Coordinates of x (N, d) along the components, rows scaled to unit length: (N, D) fp32.

        A row at the mean has no direction and stays zero.
        """
        return torch.cat([self._project(block.double()) for block in x.split(_BLOCK_ROWS)])

    def _project(self, block: Tensor) -> Tensor:
        return F.normalize((block - self.mean) @ self.components.mT, dim=1).float()


def pca(x: Tensor, dim: int) -> Tensor:
    """x (N, d) reduced to its min(dim, N - 1, d) principal components, rows of unit length: fp32.

    Raises:
        InputError: as :meth:`PCA.fit`.
    """
    return PCA.fit(x, dim).project(x)
