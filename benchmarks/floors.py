"""What a low-rank update costs at least on a GPU: the bytes and FLOPs that no kernel can leave out.

docs/cflora.md derives the numbers. The three ways to split the update from the frozen product:

    A    shrink; product; expand, which reads and writes the output once more
    B    shrink; expand, which writes the output; product, which accumulates onto it behind its arithmetic
    C    shrink; product, which begins with z Bᵀ: it alone touches the output
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from device import wait

OUTPUT_PASSES = {"A": 2, "B": 1, "C": 0}
"""How often the update reads or writes the output, beside the product itself."""


class Ceilings(NamedTuple):
    bytes_per_second: float
    flops_per_second: float


H200 = Ceilings(4.26e12, 758e12)
"""Measured: a copy, and a bf16 product (results/nvidia-h200.md)."""


class Floor(NamedTuple):
    bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        """Reading, writing and arithmetic side by side."""
        return max(self.bytes / ceilings.bytes_per_second, self.flops / ceilings.flops_per_second)


def forward(
    split: str, tokens: int, d_in: int, d_out: int, rank: int, layers: int = 1, itemsize: int = 2
) -> Floor:
    """Beyond the product: x is read once for all layers, each layer's h is written and read in fp32."""
    outputs = OUTPUT_PASSES[split] * layers * d_out
    moved = itemsize * tokens * (d_in + outputs) + 2 * 4 * tokens * layers * rank
    return Floor(moved, 2 * tokens * layers * rank * (d_in + d_out))


def backward(
    split: str, tokens: int, d_in: int, d_out: int, rank: int, layers: int = 1, itemsize: int = 2
) -> Floor:
    """With A and B frozen: each dy is read once, dx is the only output, h is read for dG."""
    moved = (
        itemsize * tokens * (layers * d_out + OUTPUT_PASSES[split] * d_in) + 3 * 4 * tokens * layers * rank
    )
    return Floor(moved, 2 * tokens * layers * rank * (d_in + d_out))


@functools.cache
def measured(device: torch.device) -> Ceilings:
    """A copy of 1 GiB and a bf16 product of 8192³, the best of ten each."""
    source = torch.zeros(2**28, device=device)
    target = torch.empty_like(source)
    left = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(left)
    copied = _best(lambda: target.copy_(source))
    multiplied = _best(lambda: torch.mm(left, left, out=product))
    return Ceilings(2 * source.nbytes / copied, 2 * 8192**3 / multiplied)


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(10):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
