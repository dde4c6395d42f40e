"""Which tokens each program of a kernel takes: tiles, runs of tokens of one instance."""

from __future__ import annotations

import torch
from torch import Tensor

from rellax.kernels._host import cdiv


def tile_tokens(tokens: int, instances: int) -> int:
    """Tokens of a tile: few where most of a larger tile would be empty."""
    return 64 if tokens >= 32 * instances else 16


def most_tiles(tokens: int, instances: int, size: int) -> int:
    """How many tiles of `size` a packed batch can have: each instance may end with one that is not full."""
    return cdiv(tokens, size) + instances


def tile_table(cu_seqlens: Tensor, tokens: int, size: int | None = None) -> Tensor:
    """The tiles of a packed batch, each of at most `size` tokens.

    The host knows how many there can be at most, `most_tiles`: nothing waits for the device.

    Args:
        cu_seqlens: (B + 1,) int32, or int64.
        tokens: T.
        size: None: `tile_tokens`.

    Returns:
        In the dtype of cu_seqlens: first (B + 1,) the number of tiles before each instance, then each tile's
        instance, B for those that are not needed.
    """
    instances = cu_seqlens.shape[0] - 1
    size = tile_tokens(tokens, instances) if size is None else size
    before = torch.zeros_like(cu_seqlens)
    before[1:] = ((cu_seqlens.diff() + (size - 1)) // size).cumsum(0)
    tile = torch.arange(most_tiles(tokens, instances, size), dtype=torch.int32, device=cu_seqlens.device)
    instance = torch.bucketize(tile, before[1:], right=True, out_int32=True)
    return torch.cat([before, instance])
