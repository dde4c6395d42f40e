"""Which tokens each program of a kernel takes, for packed batches."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_TOKENS = 64


def tile_table(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The tiles of a packed batch: runs of at most `TILE_TOKENS` tokens of one instance.

    The host knows how many there can be at most, ceil(T / TILE_TOKENS) + B: nothing waits for the device.

    Args:
        cu_seqlens: (B + 1,) int32.
        tokens: T.

    Returns:
        int32: first (B + 1,) the number of tiles before each instance, then each tile's instance, B for those
        that are not needed.
    """
    instances = cu_seqlens.shape[0] - 1
    before = torch.zeros_like(cu_seqlens)
    before[1:] = ((cu_seqlens.diff() + (TILE_TOKENS - 1)) // TILE_TOKENS).cumsum(0)
    tile = torch.arange(-(-tokens // TILE_TOKENS) + instances, dtype=torch.int32, device=cu_seqlens.device)
    instance = torch.bucketize(tile, before[1:], right=True, out_int32=True)
    return torch.cat([before, instance])
