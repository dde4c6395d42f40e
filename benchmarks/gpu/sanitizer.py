"""NVIDIA's compute-sanitizer over one small case of each operator's kernels: bad accesses, and races."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from rellax.testing.cases import OPERATORS, device

from . import records
from .records import emit
from .sections import ROOT

TOOLS = ("memcheck", "racecheck")
_AT_ONCE = 8
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_WHERE = re.compile(r"Invalid|hazard|Race reported|\bat \w+.*\+0x", re.IGNORECASE)


def main() -> None:
    tool = find()
    if device().type != "cuda":
        emit("skipped", reason="it checks accesses of a GPU, and this run has none")
    elif tool is None:
        emit(
            "skipped", reason="compute-sanitizer is not on the PATH, in CUDA_HOME or in a package of nvidia's"
        )
    else:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda pair: _check(tool, *pair), itertools.product(TOOLS, OPERATORS)))


def find() -> str | None:
    return next((str(path) for path in _candidates() if path and os.access(path, os.X_OK)), None)


def _candidates() -> Iterator[str | Path | None]:
    yield shutil.which("compute-sanitizer")
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit:
            yield Path(toolkit) / "bin" / "compute-sanitizer"
            yield Path(toolkit) / "compute-sanitizer" / "compute-sanitizer"
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        yield from Path(folder).rglob("compute-sanitizer")


def _check(sanitizer: str, tool: str, operator: str) -> None:
    """Without PyTorch's memory pool, in which one tensor's end is another's beginning."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop(records.FILE, None)
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.gpu.correctness", operator, "bfloat16", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    emit(f"{operator} {tool}", **judge(done.stdout))


def judge(output: str) -> dict[str, object]:
    """How many errors or hazards the tool's summary counts, and in which lines it says where."""
    counts = [int(count) for count in _SUMMARY.findall(output)]
    if not counts:
        last = output.strip().splitlines()[-5:]
        return {"failures": ["no summary: " + "\n".join(last)]}
    where = [line.strip("= ") for line in output.splitlines() if _WHERE.search(line)]
    failures = list(dict.fromkeys([f"{sum(counts)} reported", *where]))[:10] if any(counts) else []
    return {"reported": sum(counts), "failures": failures}


if __name__ == "__main__":
    main()
