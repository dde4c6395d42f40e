"""What every run folder holds beside its results: configuration, environment, log and curves."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rellax._files import atomic_file, read_json, write_json
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


def is_claimed(folder: str | Path, config: dict[str, Any], *, redo: bool = False) -> bool:
    """Whether a folder holds a run of `config`; False where it holds none, or that is to be done anew.

    Raises:
        InputError: it holds a run of another configuration, or something else.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(f"{folder}: expected a new folder, or that of an earlier run, found other files")
        return False
    if redo:
        return False
    found, wanted = read_json(path), json.loads(json.dumps(config))
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{folder}: holds a run with {name} = {found.get(name)}, expected {wanted.get(name)}; "
                "choose another folder, or begin anew with --redo"
            )
    return True


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
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_bfloat16(),
        "rellax_isa": os.environ.get("RELLAX_ISA"),
        "rellax_backend": os.environ.get("RELLAX_BACKEND"),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


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
    """A file of one JSON object a line, each with its `step`.

    Lines after `up_to_step` are cut off: a killed run wrote them after the checkpoint it resumes from.
    """

    def __init__(self, path: str | Path, *, up_to_step: int) -> None:
        self.path = Path(path)
        self.entries = [entry for entry in _whole_lines(self.path) if entry["step"] <= up_to_step]
        with atomic_file(self.path) as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")

    def append(self, **entry: Any) -> None:
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the entries that have `name`."""
        found = [(entry["step"], entry[name]) for entry in self.entries if name in entry]
        return [step for step, _ in found], [value for _, value in found]


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


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _version(package: str) -> str | None:
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
