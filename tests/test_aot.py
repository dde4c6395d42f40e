"""The Triton kernels compile for GPUs that are not there, and what they compile to."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rellax.kernels._build import Build
from rellax.testing.aot import TARGETS, Compiled

ROOT = Path(__file__).parent.parent


def aot(*arguments: str) -> str:
    """The command's output, from a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rellax.testing.aot", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_the_heaviest_builds_of_each_kernel(target: str) -> None:
    """Few spills, room in shared memory, wide loads, matrix instructions; `make kernels` checks them all."""
    assert aot("check", target).endswith(" builds compiled\n")


def test_the_table_lists_these_builds() -> None:
    lines = (ROOT / "docs/kernels.md").read_text(encoding="utf-8").splitlines()
    listed = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert [name for name in listed if name] == aot("names").splitlines(), "run `make kernels`"


def test_every_kernel_is_listed() -> None:
    """Builds are what launchers ask for: none is wrong, but one may be missing."""
    for section in (ROOT / "docs/kernels.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        name, *lines = section.splitlines()
        names = vars(importlib.import_module(f"rellax.kernels.{name}"))
        kernels = {
            kernel.strip("_").removesuffix("_kernel") for kernel in names if kernel.endswith("_kernel")
        }
        assert {line.split()[1] for line in lines if line.startswith("| ")} - {"|"} == kernels


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({}, None),
        ({"spilled": 32}, None),
        ({"spilled": 40}, "40 bytes spilled"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory"),
        ({"wide_loads": 0}, "no load of 16 bytes"),
        ({"wide_loads": 0, "loaded": 8}, None),
        ({"matrix": 0}, "no matrix instruction"),
    ],
)
def test_problems(facts: dict[str, int], problem: str | None) -> None:
    good = {"registers": 32, "spilled": 0, "shared": 227 * 1024, "wide_loads": 1, "matrix": 1, "loaded": 16}
    build = Build("kernel", None, {}, {}, aligned=(), uses_dot=True, backend="cuda")
    problems = Compiled("sm_90", **{**good, **facts}).problems(build)
    assert problems == ([] if problem is None else [f"kernel, sm_90: {problem}"])
