"""Principal components of the items' embeddings, computed in fp64 without a second copy of them."""

from __future__ import annotations

from collections.abc import Iterator
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
    def fit(cls, x: Tensor, dim: int) -> PCA:
        """The min(dim, N - 1, d) leading components of x (N, d): N centred rows span no more directions.

        Raises:
            InputError: x is not two-dimensional, has fewer than two rows or values that are not finite; or
                dim < 1.
        """
        if x.dim() != 2 or len(x) < 2 or not x.is_floating_point():
            raise InputError(
                f"x: expected floating (N, d) with at least 2 rows, got {tuple(x.shape)} {x.dtype}"
            )
        if dim < 1:
            raise InputError(f"dim: expected at least 1, got {dim}")
        mean = torch.stack([block.sum(0) for block in _blocks(x)]).sum(0) / len(x)
        if not mean.isfinite().all():
            raise InputError("x: expected finite values, got NaN or infinity")
        scatter = mean.new_zeros((x.shape[1], x.shape[1]))
        for block in _blocks(x):
            centred = block - mean
            scatter.addmm_(centred.mT, centred)
        _, vectors = torch.linalg.eigh(scatter)
        components = vectors.mT.flip(0)[: min(dim, len(x) - 1)]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return cls(mean, components * largest.sign())

    def project(self, x: Tensor) -> Tensor:
        """Coordinates of x (N, d) along the components, rows scaled to unit length: (N, D) fp32.

        A row at the mean has no direction and stays zero.
        """
        return torch.cat(
            [F.normalize((block - self.mean) @ self.components.mT, dim=1).float() for block in _blocks(x)]
        )


def pca(x: Tensor, dim: int) -> Tensor:
    """x (N, d) reduced to its min(dim, N - 1, d) principal components, rows of unit length: fp32.

    Raises:
        InputError: as :meth:`PCA.fit`.
    """
    return PCA.fit(x, dim).project(x)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in x.split(_BLOCK_ROWS))
