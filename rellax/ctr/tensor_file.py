"""Writes safetensors files that need not fit in memory; reading one maps it, and takes the rows asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np


def write_tensors(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], blocks: Mapping[str, Iterable[np.ndarray]]
) -> None:
    """Write float32 tensors of these shapes as a safetensors file, block by block of their rows.

    The blocks of a tensor are asked for when all tensors before it have been written.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            for block in blocks[name]:
                file.write(np.ascontiguousarray(block, dtype="<f4").data)
        assert file.tell() == 8 + len(text) + end, "the blocks have as many rows as the shapes say"
