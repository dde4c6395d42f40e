"""This machine: what it has, and its ceilings, a large copy and a large product, as torch reaches them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from rellax.ops._register import extension, extension_built

from .clock import DEVICE, median_seconds
from .records import emit
from .sections import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from sizes import DRY

PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "pytest-benchmark", "pytest-xdist")
PEERS = ("peft", "liger-kernel", "unsloth", "faiss-gpu", "faiss-gpu-cuvs", "faiss-cpu")


def main() -> None:
    emit("packages", **{name: _version(name) for name in (*PACKAGES, *PEERS)})
    emit("device", **_device())
    for name, value in _ceilings():
        emit(name, **value)
    emit("extension", **_extension())  # may take longer than the section has


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _device() -> dict[str, object]:
    found: dict[str, object] = {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def _extension() -> dict[str, str]:
    """The C++ kernels, which tests on the CPU take: built in place where there are none."""
    why = "" if DRY or find_spec("rellax._C") else _build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = extension_built()
    return {"isa": extension().isa()} if built else {"absent": why or "it was not built"}


def _build() -> str:
    """Build csrc into the checkout; the reason where that is not possible."""
    cmake = [sys.executable, "-m", "cmake"] if find_spec("cmake") else ["cmake"]
    if shutil.which(cmake[0]) is None or find_spec("nanobind") is None:
        return "cmake and nanobind would build it, and one of them is not installed"
    folder = ROOT / "build" / "gpu"
    configure = [*cmake, "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    query = [sys.executable, "-m", "nanobind", "--cmake_dir"]
    nanobind = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    configure += [f"-Dnanobind_DIR={nanobind}", f"-DPython_EXECUTABLE={sys.executable}"]
    install = [*cmake, "--install", folder, "--prefix", ROOT]
    for command in (configure, [*cmake, "--build", folder, "--parallel"], install):
        if subprocess.run(command).returncode:
            return f"`{' '.join(map(str, command))}` failed"
    return ""


def _ceilings() -> list[tuple[str, dict[str, float]]]:
    """Bytes read and written per second of a copy; the rate of a square product of random matrices."""
    on_gpu = DEVICE.type == "cuda"
    source = torch.randn(2**30 if on_gpu else 2**12, device=DEVICE)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), 100)
    found = [("copy", {"bytes_per_s": 2 * source.nbytes / seconds})]
    size = 8192 if on_gpu else 64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        seconds = median_seconds(lambda a=a, b=b: a @ b, 100)
        found.append((str(dtype).replace("torch.", "product "), {"flops_per_s": 2 * size**3 / seconds}))
    return found


if __name__ == "__main__":
    main()
