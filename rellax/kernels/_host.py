"""What launchers do on the host.

Triton's own functions of integers serve kernels as well, and take microseconds each.
"""

from __future__ import annotations

from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """x as (N, d) with the elements of a row side by side; a copy only where it cannot be a view."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
