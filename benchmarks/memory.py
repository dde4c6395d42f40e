"""What a benchmark asks of the memory allocator."""

from __future__ import annotations

import ctypes
import sys


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
