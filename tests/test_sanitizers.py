"""The C++ kernels of every ISA level under AddressSanitizer and UBSan, their threads under ThreadSanitizer.

tests/sanitizers/driver.cpp runs them over odd sizes, in heap blocks without a byte to spare. It knows
nothing of Python: neither its allocator nor PyTorch's hides an access beside an array.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import cmake
import pytest

from rellax import _C

ROOT = Path(__file__).parent.parent
LEVELS = _C.supported_isas()


def build(folder: Path, sanitizers: str) -> Path:
    """The driver, built with these sanitizers."""
    tool = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    configure = [tool, "-S", ROOT, "-B", folder, "-G", "Unix Makefiles", f"-DRELLAX_SANITIZE={sanitizers}"]
    for command in (configure, [tool, "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "driver"


def run(driver: Path, part: str, level: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(driver), part]
    environment = {**os.environ, "RELLAX_ISA": level, "UBSAN_OPTIONS": "print_stacktrace=1"}
    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, check=False, **options)
    if "ThreadSanitizer: unexpected memory mapping" in done.stderr:
        # Where addresses are more random than this version of it expects.
        done = subprocess.run(["setarch", platform.machine(), "-R", *command], check=False, **options)
        if "failed to set personality" in done.stderr:
            pytest.skip("ThreadSanitizer finds no room for its shadow memory in this container")
    return done


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("asan"), "address,undefined")


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tsan"), "thread")


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_stay_within_their_memory(memory: Path, level: str) -> None:
    done = run(memory, "kernels", level)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{level}: kernels done\n"


def test_callers_side_by_side_do_not_race(threads: Path) -> None:
    done = run(threads, "callers")
    assert done.returncode == 0, done.stderr
    assert "callers done" in done.stdout


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        ("overflow", "AddressSanitizer: heap-buffer-overflow"),
        ("underflow", "AddressSanitizer: heap-buffer-overflow"),
        ("undefined", "runtime error: load of misaligned address"),
    ],
)
def test_a_mistake_is_seen(memory: Path, level: str, mistake: str, complaint: str) -> None:
    done = run(memory, mistake, level)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_a_race_is_seen(threads: Path) -> None:
    done = run(threads, "race")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
