"""What the reference operators share: accumulation dtype, sums of rows, dropout."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every narrower floating dtype, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """out[i] = the sum of rows[j] over all j with index[j] == i: (count, d) in fp32 (fp64 for fp64 rows).

    It is the gradient of a lookup, and computed so: unlike index_add, it adds in a fixed order on a GPU too.
    """
    rows = rows.to(accumulation_dtype(rows.dtype))
    return torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Dropout's keep mask (rows, columns), a pure function of (seed, row, column): any pass can recompute it.

    A 32-bit integer hash decides: element (i, j) is kept when ``mix(row(i) ^ column(j)) >= p * 2**32``, where
    row and column are hashes of the index and one half of the seed.

    Args:
        seed: () int64.
        p: probability of dropping, in [0, 1).
    """
    low = (seed & 0xFFFFFFFF).to(torch.int32)
    row = _mix(_mix(torch.arange(rows, dtype=torch.int32, device=seed.device)) ^ low)
    return _mix(row[:, None] ^ column_hashes(seed, columns)) >= keep_threshold(p)


def column_hashes(seed: Tensor, columns: int) -> Tensor:
    """(columns,) int32: what `keep_mask` takes of a column, with the seed's high half in it."""
    high = ((seed >> 32) & 0xFFFFFFFF).to(torch.int32)
    return _mix(_mix(torch.arange(columns, dtype=torch.int32, device=seed.device)) + high)


def keep_threshold(p: float) -> int:
    """The least signed 32-bit hash that is kept; the largest hash always is."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def _mix(h: Tensor) -> Tensor:
    """A bijective 32-bit mixer of two multiplications; signed overflow wraps, shifts are made logical."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)
