"""How long something takes: on a GPU by its own clock, its caches emptied before each run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_seconds(run: Callable[[], object], milliseconds: int = 25) -> float:
    """The median over `milliseconds` of runs, after a warm-up; of two runs where there is no GPU."""
    if DEVICE.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=10, rep=milliseconds, return_mode="median")) / 1e3
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
