"""Configurations of kernels: static, what was found fastest on each architecture."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch


class Tuned(dict[Any, Any]):
    """A configuration, and what is different on architectures where something else was found faster.

    ``Tuned({"BLOCK": 4096, "num_warps": 8}, sm_90={"num_warps": 4})``; `make gpu TUNE=1` finds what to add.
    """

    def __init__(self, usual: Mapping[Any, Any], **architectures: Mapping[Any, Any]) -> None:
        super().__init__(usual)
        self.architectures = architectures

    def on(self, device: torch.device) -> dict[Any, Any]:
        """The configuration for a device."""
        return {**self, **self.architectures.get(architecture(device), {})}

    @contextlib.contextmanager
    def trial(self, device: torch.device, changes: Mapping[Any, Any]) -> Iterator[None]:
        """Within: other values on devices of this one's architecture."""
        before = self.architectures
        self.architectures = {**before, architecture(device): {**self.on(device), **changes}}
        try:
            yield
        finally:
            self.architectures = before


@functools.cache
def architecture(device: torch.device) -> str:
    """As compilers name it: "sm_90", "gfx942"; "" for what is no GPU."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
