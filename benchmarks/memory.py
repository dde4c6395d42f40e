"""What benchmarks ask of the memory allocator, and how much memory they take."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from device import DEVICE


def keep_freed_memory() -> None:
    """Let blocks up to 32 MB, glibc's limit, come from memory that was freed before, from now on.

    Otherwise it depends on what ran before whether the system hands out a block's pages anew: that takes
    longer than most kernels.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        assert libc.mallopt(mmap_threshold, 2**25), "mallopt refuses the threshold"
        libc.mallopt(trim_threshold, 2**30)


def apart(measure: Callable[..., int], *arguments: object) -> int:
    """`measure` in a process of its own; on a GPU, whose allocator knows its peak, in this one."""
    if DEVICE.type == "cuda":
        return measure(*arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes that the device's memory grows by during the run, at most; to be called `apart`."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew at what is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
