"""`make gpu`: whether every kernel is right on this machine's GPU, and how far from the hardware's limits.

    python -m benchmarks.gpu [--dry] [--only SECTION,...] [--out FOLDER] [--budget SECONDS]

Takes the Python that runs it with the packages it has, and no network. Writes FOLDER/<gpu>.json as results
come, FOLDER/<gpu>.md with a verdict for each bar, and charts. Exit status 1: something is wrong, the page
says what.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rellax._files import atomic_file, read_json
from rellax.errors import InputError

from .report import report, wrong
from .sections import ROOT, Section, run_sections

BUDGET = 570.0
"""Seconds of a run: under ten minutes, with some for what comes before and after."""

TUNE = "tune"
"""The section that only a dry run does without being asked."""

PYTEST = ("-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_log", "-p", "no:cacheprovider")
DRY_RUN = {
    "RELLAX_DRY": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",  # what it compiles takes minutes on a CPU
}


def sections(dry: bool) -> list[Section]:
    """In order: the cheapest and most telling first."""
    tests = [*PYTEST, "--continue-on-collection-errors", "-m", "not slow"]  # the slow ones need a network
    tests += ["--ignore=tests/test_gpu_script.py"]  # its sections would outlive this one
    if dry:
        tests += ["tests/test_oracle.py"]
    elif find_spec("xdist"):
        tests += ["-n", "auto", "--maxprocesses", "16", "--dist", "loadfile"]
    files = {path.name: str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("benchmarks/bench_*.py"))}
    if not dry:
        del files["bench_item_topk.py"]  # it runs on the CPU
    step, last = files.pop("bench_step.py", None), files.pop("bench_cflora.py")
    files["bench_cflora.py"] = last  # the sweep has measured most of it
    timed = [*PYTEST, "--benchmark-only"]
    benchmarks = [[*timed, *files.values()]] if dry else [[*timed, file] for file in files.values()]
    benchmark = ["pytest", "pytest_benchmark"]
    return [
        Section("machine", "the machine and its ceilings", [_module("machine")], 15),
        Section("correctness", "operators against fp64, memory full of NaN", [_module("correctness")], 110),
        Section("sweep", "operators over sizes, beside peers", [_module("sweep")], 110, needs=["pytest"]),
        Section("tests", "the tests", [tests], 110, needs=["pytest"], variables={"OMP_NUM_THREADS": "1"}),
        Section("sanitizer", "compute-sanitizer: memcheck and racecheck", [_module("sanitizer")], 45),
        Section("benchmarks", "benchmarks with peers", benchmarks, 100, needs=benchmark),
        Section("step", "the whole training step", [[*timed, step]] if step else [], 80, needs=benchmark,
                nothing="there is no benchmarks/bench_step.py"),
        Section(TUNE, "configurations of kernels, the fastest beside the present", [_module(TUNE)], 60),
    ]  # fmt: skip


def _module(name: str) -> list[str]:
    return ["-m", f"benchmarks.gpu.{name}"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny inputs on the CPU: does the script work?")
    parser.add_argument("--only", default="", metavar="SECTIONS", help="comma-separated; the others are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except InputError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    name = "dry-run" if options.dry else _gpu()
    there = {section.name: section for section in sections(options.dry)}
    only = [name for name in options.only.split(",") if name]
    if unknown := [name for name in only if name not in there]:
        raise InputError(f"--only: expected some of {', '.join(there)}, got {', '.join(unknown)}")
    wanted = only or [name for name in there if options.dry or name != TUNE]
    path = options.out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    results: dict[str, Any] = {
        "machine": name,
        "dry": options.dry,
        "commit": _commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "budget_s": options.budget,
        "sections": read_json(path)["sections"] if only and path.exists() else {},
    }
    environment = os.environ | (DRY_RUN if options.dry else {})
    run_sections(
        [section for name, section in there.items() if name in wanted],
        results,
        path,
        options.budget,
        environment,
        lambda results: _write(path.with_suffix(".md"), report(results)),
    )
    plot = [sys.executable, "-m", "benchmarks.plot", str(path)]
    if find_spec("matplotlib") is None or subprocess.run(plot, cwd=ROOT, env=environment).returncode:
        print("no charts: matplotlib is not installed, or benchmarks/plot.py failed")
    print(report(results))
    return 1 if wrong(results) else 0


def _gpu() -> str:
    """Its name, found out in a process of its own: this one takes nothing of the GPU."""
    query = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True)
    if not (name := done.stdout.strip()):
        last = done.stderr.strip().splitlines()[-1:] or ["torch sees no CUDA device"]
        raise InputError(f"expected a GPU, found none ({last[0]}); DRY=1 shows what would run")
    return name


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends as well
    sys.exit(main(sys.argv[1:]))
