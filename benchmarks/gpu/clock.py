"""How long something takes: on a GPU by its own clock, its caches emptied before each run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..device import DEVICE, wait

LONG = 0.1
"""Seconds of a run from which on what the caches hold, and the host's part in it, no longer count."""


def median_seconds(run: Callable[[], object], milliseconds: int = 25) -> float:
    """The median over `milliseconds` of runs, warmed up; of two where a run is long or there is no GPU."""
    seconds = [_seconds(run) for _ in range(2)]
    if DEVICE.type == "cuda" and seconds[1] < LONG:
        from triton.testing import do_bench

        return float(do_bench(run, warmup=10, rep=milliseconds, return_mode="median")) / 1e3
    return statistics.median([seconds[1], _seconds(run)])


def replay(run: Callable[[], object]) -> Callable[[], object] | None:
    """`run` as a CUDA graph, which takes the GPU's time alone; None where it cannot be captured."""
    if DEVICE.type != "cuda":
        return None
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            run()
    except RuntimeError:  # it makes the host wait; a capture that fails would leave the generator unusable
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(run: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
