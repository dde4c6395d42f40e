"""What this machine has, which backend each operator would use, whether they work, and what to do next."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from tqdm import tqdm

from rellax.ctr import runs, selftest
from rellax.errors import InputError
from rellax.ops import _register

GIVES = {
    "triton": "the operators' GPU kernels",
    "fuxictr": "`rellax crm`: the classical models",
    "accelerate": "`rellax train`, on one process or many",
    "pyarrow": "all commands that read data",
    "scikit-learn": "metrics",
    "matplotlib": "training curves",
    "peft": "PEFT checkpoints and models",
    "gguf": "the embedded default model",
    "faiss-cpu": "approximate `item_neighbours`",
    "ray": "`rellax embed --ray` and `retrieve --ray`",
    "bitsandbytes": "bases in 4 and 8 bits",
    "torchao": "bases in 4 and 8 bits",
    "tensorboard": "curves while training runs",
}
_CORE = ("rellax", "torch", "transformers", "safetensors", "numpy")
_EXTRAS = ("ctr", "faiss", "quant", "ray")
"""Those for users: `dev` pins tools, and a Triton that need not be the one that this torch brought."""
_CTR = ("accelerate", "fuxictr", "matplotlib", "pyarrow", "scikit-learn")
_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "HF_HUB_OFFLINE", "RAY_ADDRESS")
_TIMEOUT = 20  # seconds for nvidia-smi


def doctor(*, as_json: bool = False, progress: bool = True) -> int:
    """Print what was found; returns 1 where an operator cannot run or fails its test, else 0.

    A probe that fails is part of what is found, and never ends the others.
    """
    found = examine(progress=progress)
    text = json.dumps(found, indent=2, ensure_ascii=False) if as_json else describe(found)
    sys.stdout.write(text + "\n")
    return 0 if found["ok"] else 1


def examine(*, progress: bool = False) -> dict[str, Any]:
    """Everything as a JSON-ready dictionary: a section for each probe, `failed` ones, `advice` and `ok`."""
    failed: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, probe in _PROBES.items():
        found[name], error = _tried(probe)
        if error:
            failed[name] = error
    devices = ["cpu", "cuda"] if (found["gpus"] or {}).get("usable") else ["cpu"]
    found["self-test"] = [asdict(result) for result in _tested(devices, progress)]
    found["failed"] = failed
    found["advice"] = list(_advice(found))
    broken = any(result["failure"] for result in found["self-test"])
    found["ok"] = not (broken or failed)
    return found


def _tried(probe: Callable[[], Any]) -> tuple[Any, str]:
    """What a probe finds, or None and why it finds nothing."""
    try:
        return probe(), ""
    except Exception as error:  # a machine may be broken in any way, and that is to be reported
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0]}"


def _tested(devices: list[str], progress: bool) -> Iterator[selftest.Result]:
    todo = selftest.trials(devices)
    bar = tqdm(total=len(todo), desc="self-test", unit="test", delay=2, disable=not progress)
    with bar:
        for result in selftest.run(todo):
            bar.update()
            yield result


def _machine() -> dict[str, Any]:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = runs.environment()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": known["cpu"],
        "allocator": known["allocator"],
        "cores": usable,
        "threads": known["threads"],
        "memory_gib": round(pages * size / 2**30, 1),
        "bfloat16": known["bfloat16"],
        "torch_isa": known["isa"],
    }


def _extension() -> dict[str, Any]:
    if importlib.util.find_spec("rellax._C") is None:
        return {"built": False}
    module = importlib.import_module("rellax._C")
    return {"built": True, "file": module.__file__, "isa": module.isa(), "isas": module.supported_isas()}


def _gpus() -> dict[str, Any]:
    usable = torch.cuda.is_available()
    devices = []
    for index in range(torch.cuda.device_count() if usable else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"usable": usable, "torch_cuda": torch.version.cuda, "devices": devices, "driver": _driver()}


def _driver() -> list[str]:
    """A line for each GPU that nvidia-smi sees; none where there is no such command, or it sees none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _packages() -> dict[str, str | None]:
    return {name: runs.version(name) for name in (*_CORE, *GIVES)}


def _outdated() -> list[str]:
    """Requirements of rellax, and of its extras for users, that an installed package does not meet."""
    found = []
    for text in _requirements():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *_EXTRAS)):
            continue
        version = runs.version(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            found.append(
                f"{requirement.name} {version} is installed, rellax asks for {requirement.specifier}"
            )
    return list(dict.fromkeys(found))


def _requirements() -> list[str]:
    try:
        return metadata.requires("rellax") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return []


def _variables() -> dict[str, str]:
    names = sorted({*_VARIABLES, *(name for name in os.environ if name.startswith("RELLAX_"))})
    return {name: os.environ[name] for name in names if name in os.environ}


def _backends() -> dict[str, dict[str, str]]:
    """By operator and device with dtype: the backend, or why there is none."""
    return {
        operator: {
            f"{device} {dtype}": _backend(operator, device, dtype)
            for device in ("cpu", "cuda")
            for dtype in selftest.DTYPES
        }
        for operator in selftest.CASES
    }


def _backend(operator: str, device: str, dtype: str) -> str:
    try:
        return _register.backend_of(operator, torch.device(device), getattr(torch, dtype))
    except InputError as error:
        return f"none: {error}"


_PROBES: dict[str, Callable[[], Any]] = {
    "machine": _machine,
    "gpus": _gpus,
    "extension": _extension,
    "packages": _packages,
    "outdated": _outdated,
    "variables": _variables,
    "backends": _backends,
}


def _advice(found: dict[str, Any]) -> Iterator[str]:
    """What is off, and the next step for each; works with whatever probes came through."""
    machine, gpus, extension = (found[name] or {} for name in ("machine", "gpus", "extension"))
    packages, variables = found["packages"] or {}, found["variables"] or {}
    for name, error in found["failed"].items():
        yield f"{name} could not be examined ({error}); please report it with this output"
    if extension.get("built") is False:
        yield (
            "the C++ extension is not built, so operators run as plain PyTorch on the CPU: "
            "`pip install -e .` in the checkout builds it, with a C++ compiler"
        )
    isas = extension.get("isas") or []
    if isas and extension["isa"] != isas[-1]:
        yield f"RELLAX_ISA holds the C++ kernels at {extension['isa']}: unset it for {isas[-1]}"
    if "RELLAX_BACKEND" in variables:
        yield f"RELLAX_BACKEND={variables['RELLAX_BACKEND']} decides for all operators: unset it for the best"
    if machine.get("threads") == 1 and (machine.get("cores") or 1) > 1:
        yield (
            f"PyTorch uses 1 of {machine['cores']} cores: unset OMP_NUM_THREADS, or give the commands "
            "--threads"
        )
    if machine.get("bfloat16") is False:
        yield (
            "no bfloat16 in hardware, so models run in float32, at twice the memory: a smaller --model is "
            "quicker"
        )
    if machine.get("allocator") == "glibc" and not gpus.get("usable"):
        yield (
            "malloc is glibc's: a long training on the CPU is quicker, and needs less memory, with tcmalloc: "
            "`LD_PRELOAD=libtcmalloc_minimal.so.4 rellax train …`"
        )
    yield from _gpu_advice(gpus, packages)
    for name in _CORE[1:]:
        if name in packages and packages[name] is None:
            yield f"{name} is not installed: `pip install {name}`"
    for line in found["outdated"] or ():
        yield f"{line}: `pip install --upgrade {line.split()[0]}`"
    if extras := [name for name in _CTR if name in packages and packages[name] is None]:
        yield f"{', '.join(extras)} missing for the pipeline's commands: `pip install 'rellax[ctr]'`"
    failures = [result for result in found["self-test"] if result["failure"]]
    if failures:
        names = ", ".join(dict.fromkeys(f"{one['operator']} on {one['device']}" for one in failures))
        yield (
            f"the self-test failed for {names}: RELLAX_BACKEND=reference does without kernels until it is "
            "mended"
        )


def _gpu_advice(gpus: dict[str, Any], packages: dict[str, str | None]) -> Iterator[str]:
    if gpus.get("usable"):
        if "triton" in packages and packages["triton"] is None:
            yield "Triton is not installed, so operators on the GPU are plain PyTorch: `pip install triton`"
        old = [one for one in gpus["devices"] if float(one["capability"]) < 8]
        if old:
            yield f"{old[0]['name']}, of capability {old[0]['capability']}, has no bfloat16: --dtype float32"
    elif gpus.get("driver"):
        if gpus["torch_cuda"] is None:
            yield (
                f"there is a GPU ({gpus['driver'][0]}), but this torch was built without CUDA: `make setup "
                "TORCH=…` or https://pytorch.org/get-started has builds with it"
            )
        else:
            yield (
                f"torch cannot use the GPU ({gpus['driver'][0]}): the driver is older than torch's CUDA "
                f"{gpus['torch_cuda']}, or CUDA_VISIBLE_DEVICES hides it; update the driver or take a torch "
                "built for an older CUDA"
            )


def describe(found: dict[str, Any]) -> str:
    """What was found, for people."""
    sections = [
        _section("Machine", _machine_lines(found)),
        _section("Packages", _package_lines(found["packages"] or {})),
        _section("Variables", [f"{name}={value}" for name, value in (found["variables"] or {}).items()]),
        _section("Backends", _backend_lines(found)),
        _section("Self-test: forward and backward against PyTorch in fp64", _test_lines(found["self-test"])),
        _section("Advice", [f"- {line}" for line in found["advice"]]),
        "All is well." if found["ok"] else "Something is wrong.",
    ]
    return "\n\n".join(section for section in sections if section)


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _machine_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if machine := found["machine"]:
        lines += [
            f"{machine['system']}, Python {machine['python']}",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"{'with' if machine['bfloat16'] else 'without'} bfloat16",
            f"{machine['memory_gib']} GiB of memory, malloc of {machine['allocator'] or 'the system'}",
        ]
    if extension := found["extension"]:
        built = extension["built"]
        levels = f"{extension['isa']}, of {', '.join(extension['isas'])}" if built else "not built"
        lines.append(f"C++ kernels: {levels}")
    if gpus := found["gpus"]:
        for one in gpus["devices"]:
            lines.append(f"{one['name']}, {one['memory_gib']} GiB, capability {one['capability']}")
        lines += [f"driver: {line}" for line in gpus["driver"]]
        lines += [] if gpus["usable"] else ["no GPU that PyTorch can use"]
    return lines


def _package_lines(packages: dict[str, str | None]) -> list[str]:
    lines = []
    for name, version in packages.items():
        purpose = f"  {GIVES[name]}" if name in GIVES else ""
        lines.append(f"{name:14} {version or 'not installed':16}{purpose}".rstrip())
    return lines


def _backend_lines(found: dict[str, Any]) -> list[str]:
    backends = found["backends"] or {}
    columns = list(next(iter(backends.values()), {}))
    lines = [f"{'':14} " + " ".join(f"{column:14}" for column in columns)] if columns else []
    for operator, row in backends.items():
        lines.append(f"{operator:14} " + " ".join(f"{row[column]:14}" for column in columns))
    return [line.rstrip() for line in lines]


def _test_lines(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for one in results:
        where = f"{one['operator']:14} {one['device']:5} {one['dtype']:9} {one['backend']:10}"
        came = f"ok {one['milliseconds']:8.2f} ms" if not one["failure"] else f"FAILED: {one['failure']}"
        lines.append(f"{where} {came}")
    return lines
