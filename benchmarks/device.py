"""The device that benchmarks run on, and when it is done."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """For a GPU to finish what it was given; a CPU has."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
