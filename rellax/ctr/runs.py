"""What every run folder holds beside its results: configuration, environment, log and curves."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rellax._files import atomic_file, read_json, remove_leftovers, write_json
from rellax.ctr.config import KINDS
from rellax.errors import InputError

_PACKAGES = (
    "rellax",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "fuxictr",
    "numpy",
    "pyarrow",
    "scikit-learn",
)
_EXECUTION = (
    *("micro_batch_size", "eval_batch_size", "gradient_checkpointing"),
    *("compile", "packing", "checkpoint_every"),
)


def is_claimed(
    folder: str | Path,
    config: dict[str, Any],
    *,
    command: str | None = None,
    redo: bool = False,
    advice: str | None = None,
) -> bool:
    """Whether a folder holds a run of `config`; False where it holds none, or that is to be done anew.

    How it was executed may differ.

    Args:
        command: "crm", "embed", "retrieve" or "train", which can begin anew; None is one that cannot.
        redo: whether it was told to.
        advice: what to do where the folder holds another run; None is to choose another folder.

    Raises:
        InputError: it holds a run of another configuration, or something else; to begin anew, anything but a
            run of `command`.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(f"{folder}: expected a new folder, or that of an earlier run, found other files")
        return False
    found, wanted = read_json(path), json.loads(json.dumps(config))
    if command is not None and redo:
        if not isinstance(found, dict) or not KINDS[command] <= found.keys():
            raise InputError(
                f"{folder}: expected a run of `rellax {command}` to begin anew, found another kind"
            )
        return False
    differences = list(differing(without_execution(found), without_execution(wanted)))
    options = [f"{name} = {one}, expected {other}" for name, one, other in differences if not _is_input(name)]
    files = [name.partition(".")[2] for name, *_ in differences if _is_input(name)]
    if differs := ", and ".join(options + [f"other contents of {', '.join(files)}"] * bool(files)):
        or_anew = "" if command is None else ", or begin anew with --redo"
        advice = advice or f"choose another folder{or_anew}"
        raise InputError(f"{folder}: holds a run with {differs}; {advice}")
    return True


def _is_input(name: str) -> bool:
    """Whether a difference is one of hashes, which nobody reads."""
    return name.startswith("inputs.")


def without_execution(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what only says how a run is executed: it changes rounding and dropout alone."""
    return {
        name: without_execution(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _EXECUTION
    }


def differing(
    found: dict[str, Any], wanted: dict[str, Any], inside: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two configurations: its name, and what either has."""
    for name in wanted | found:
        one, other = found.get(name), wanted.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differing(one, other, f"{inside}{name}.")
        elif one != other:
            yield f"{inside}{name}", one, other


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes from working in a folder meanwhile, where its file system has locks.

    Raises:
        InputError: another process does so now.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # a lock of the folder leaves no file behind
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"{folder}: expected no other process at work there, found one"
                raise InputError(message) from None
            remove_leftovers(folder)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def has_inputs(folder: str | Path, inputs: dict[str, str]) -> bool:
    """Whether the run in a folder was made from files of these hashes."""
    path = Path(folder) / "inputs.json"
    return path.exists() and read_json(path) == inputs


def write_record(folder: str | Path, config: dict[str, Any], inputs: dict[str, str]) -> None:
    """Write what was run, where and on what: config.json, environment.json and inputs.json."""
    write_json(Path(folder) / "inputs.json", inputs)
    write_json(Path(folder) / "environment.json", environment())
    write_json(Path(folder) / "config.json", config)


def environment() -> dict[str, Any]:
    """Versions, processor and threads, as a JSON-ready dictionary."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in _PACKAGES},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16(),
        "rellax_isa": os.environ.get("RELLAX_ISA"),
        "rellax_backend": os.environ.get("RELLAX_BACKEND"),
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def allocator() -> str | None:
    """Whose malloc this process has: "tcmalloc", "jemalloc", "mimalloc" or "glibc"; None where unknown."""
    maps = Path("/proc/self/maps")
    mapped = maps.read_text() if maps.exists() else ""
    others = (name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"/lib{name}" in mapped)
    return next(others, platform.libc_ver()[0] or None)


def machine() -> str:
    """What `environment` says, as two sentences for a report."""
    found = environment()
    processor = ", ".join(found["gpus"]) or f"{found['cpu']}, {found['threads']} threads, {found['isa']}"
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return f"{processor}. Python {found['python']}, {packages}."


def has_bfloat16() -> bool:
    """Whether the GPU, or the CPU where there is none, multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_memory_gib() -> float:
    """The largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Log:
    """A file of one JSON object a line, each with its `step`, and on request TensorBoard's event files.

    Lines after `up_to_step` are cut off: a killed run wrote them after the checkpoint it resumes from. The
    event files are written anew from those that stay, so no step is in them twice.
    """

    def __init__(self, path: str | Path, *, up_to_step: int, board: Path | None = None) -> None:
        self.path = Path(path)
        self.board: Any = None
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(board, ignore_errors=True)
            self.board = SummaryWriter(str(board))
        with atomic_file(self.path) as part, part.open("w", encoding="utf-8") as file:
            for entry in entries(self.path):
                if entry["step"] <= up_to_step:
                    file.write(json.dumps(entry) + "\n")
                    self._show(entry)

    def append(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._show(entry)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the entries that have `name`."""
        found = [(entry["step"], entry[name]) for entry in entries(self.path) if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    def close(self) -> None:
        """Nothing is appended any more."""
        if self.board is not None:
            self.board.close()

    def _show(self, entry: dict[str, Any]) -> None:
        if self.board is not None:
            for name, value in entry.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, entry["step"])


def check_tensorboard() -> None:
    """Raise an InputError where the package that writes TensorBoard's event files is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard: expected this package, found none; `pip install tensorboard` adds it")


def plot_curves(path: str | Path, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> None:
    """A PNG with one panel per curve (title, steps, values)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (title, steps, values) in zip(axes, curves, strict=True):
        axis.plot(steps, values, marker="." if len(values) < 50 else None)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=120)


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log; a line without an end is none, whoever wrote it was killed."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
