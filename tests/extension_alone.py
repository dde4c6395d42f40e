"""cibuildwheel's test of each wheel, `python extension_alone.py`: runs a kernel of it without PyTorch."""

from __future__ import annotations

import importlib.util
from array import array
from importlib.machinery import PathFinder
from types import ModuleType


def load() -> ModuleType:
    """``rellax._C`` by itself: it needs no PyTorch, which the package around it imports."""
    package = importlib.util.find_spec("rellax")
    assert package is not None
    spec = PathFinder.find_spec("rellax._C", package.submodule_search_locations)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nearest(extension: ModuleType) -> list[int]:
    """Where in the history 3, 1, 2 of one user the two items nearest to item 0 are."""
    embeddings = array("f", [1, 0, 0, 1, 0.8, 0.6, 0.6, 0.8])
    items, offsets, query = array("q", [3, 1, 2]), array("q", [0, 3]), array("q", [0, 0, 3])
    positions, scores = array("q", [9, 9]), array("f", [9, 9])
    target, end = query.buffer_info()[0], query.buffer_info()[0] + 2 * query.itemsize
    extension.history_topk(
        embeddings=embeddings.buffer_info()[0],
        dtype="float32",
        count=4,
        dim=2,
        items=items.buffer_info()[0],
        offsets=offsets.buffer_info()[0],
        users=1,
        target=target,
        user=target,
        end=end,
        queries=1,
        k=2,
        positions=positions.buffer_info()[0],
        scores=scores.buffer_info()[0],
        threads=1,
    )
    return positions.tolist()


if __name__ == "__main__":
    extension = load()
    found = nearest(extension)
    if found != [2, 0]:
        raise SystemExit(f"history_topk: expected positions [2, 0], got {found}")
    print(f"{extension.__file__}: {extension.isa()} of {', '.join(extension.supported_isas())}")
