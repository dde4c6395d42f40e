"""Configurations of kernels: static, what was found fastest on each architecture.

`make gpu TUNE=1` looks for faster ones. What it finds on an architecture that a table does not list is kept
in the cache folder and used on that machine from then on; a line in the table makes it everybody's.
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rellax._files import cache_folder, read_json, write_json

SMALL = ("sm_86", "sm_89", "sm_120")
"""Cards on which a program can have 99 KB of shared memory: on an A100 it is 163, from an H100 on 227."""


class Tuned(dict[Any, Any]):
    """A configuration, and what is different on architectures where something else was found faster.

    ``Tuned("answer", {"BLOCK": 4096, "num_warps": 8}, sm_90={"num_warps": 4})``; the cache goes by the name.
    """

    def __init__(self, name: str, usual: Mapping[Any, Any], **architectures: Mapping[Any, Any]) -> None:
        super().__init__(usual)
        self.name = name
        self.architectures = architectures
        self._kept: dict[str, dict[Any, Any]] = {}  # what the cache holds: looked up once, not at each launch

    def on(self, device: torch.device) -> dict[Any, Any]:
        """The configuration for a device."""
        name = architecture(device)
        return {**self, **(self.architectures[name] if name in self.architectures else self._found(name))}

    @contextlib.contextmanager
    def trial(self, device: torch.device, changes: Mapping[Any, Any]) -> Iterator[None]:
        """Within: other values on devices of this one's architecture."""
        before = self.architectures
        self.architectures = {**before, architecture(device): {**self.on(device), **changes}}
        try:
            yield
        finally:
            self.architectures = before

    def remember(self, device: torch.device, changes: Mapping[Any, Any]) -> None:
        """Keep what was found faster than the usual values on an architecture that is not listed."""
        path = _cache()
        found = read_json(path) if path.exists() else {}
        kept = {**self._found(architecture(device)), **changes}
        write_json(path, {**found, self._key(architecture(device)): repr(kept)})
        _read.cache_clear()
        self._kept.clear()

    def _found(self, name: str) -> dict[Any, Any]:
        if name not in self._kept:
            self._kept[name] = ast.literal_eval(_read(_cache()).get(self._key(name), "{}")) if name else {}
        return self._kept[name]

    def _key(self, name: str) -> str:
        """It names the usual values: what was faster than others says nothing."""
        return f"{name}, {self.name} {dict(self)}"


def _cache() -> Path:
    return cache_folder() / "tuning.json"


@functools.cache
def _read(path: Path) -> dict[str, str]:
    found: dict[str, str] = read_json(path) if path.exists() else {}
    return found


@functools.cache
def architecture(device: torch.device) -> str:
    """As compilers name it: "sm_90", "gfx942"; "" for what is no GPU."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
