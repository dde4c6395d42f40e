"""What the Triton kernels compile to, for GPUs that need not be there.

    python -m rellax.testing.aot table FILE     every build of all modules in rellax.kernels, for every target
    python -m rellax.testing.aot check TARGET   the heaviest builds of each kernel, for one target
    python -m rellax.testing.aot names          the builds that the table has to list

The first two exit with 1 where a build has a problem. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import importlib
import itertools
import math
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import rellax.kernels
from rellax._files import atomic_file
from rellax.kernels._build import Build

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes that a program can have."""

_SPILLED = 32
"""Bytes of a thread that are no problem: some versions of the compiler spill a few that they read once."""
_WIDE_LOADS = {
    "cuda": r"ld\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)|cp\.async\.cg\.shared\.global.*, 0x10",
    "hip": r"(global|buffer|flat)_load_dwordx4",
}
_MATRIX = {"cuda": r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", "hip": r"v_mfma"}


@dataclass(frozen=True)
class Compiled:
    """What a build became on a target.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that found no room in registers.
        shared: bytes of shared memory of a program.
        wide_loads: instructions that load 16 bytes of global memory at once.
        matrix: matrix instructions.
        loaded: bytes of a thread in the largest of the kernel's loads.
    """

    target: str
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    matrix: int
    loaded: int

    def __str__(self) -> str:
        kilobytes = -(-self.shared // 1024)
        return f"{self.registers} / {self.spilled} / {kilobytes} / {self.wide_loads} / {self.matrix}"

    def problems(self, build: Build) -> list[str]:
        """What no build should be."""
        found = {
            f"{self.spilled} bytes spilled": self.spilled > _SPILLED,
            f"{self.shared} bytes of shared memory": self.shared > SHARED_MEMORY[self.target],
            "no load of 16 bytes": self.wide_loads == 0 and self.loaded >= 16 and self.target != "gfx942",
            "no matrix instruction": self.matrix == 0 and build.uses_dot,
        }
        return [f"{build.name}, {self.target}: {problem}" for problem, there in found.items() if there]


def modules() -> dict[str, list[Build]]:
    """The builds of each module in ``rellax.kernels`` that has any; of those that are the same, the first."""
    found = {}
    for info in pkgutil.iter_modules(rellax.kernels.__path__):
        module = importlib.import_module(f"rellax.kernels.{info.name}")
        if hasattr(module, "builds"):
            builds: dict[str, Build] = {}
            for build in module.builds():
                builds.setdefault(str(replace(build, name="")), build)
            found[info.name] = list(builds.values())
    return found


def heaviest(builds: Iterable[Build]) -> list[Build]:
    """The last build of each kernel and backend, with and without matrix instructions."""
    return list({(build.kernel, build.backend, build.uses_dot): build for build in builds}.values())


def compile_all(builds: Iterable[Build], targets: Sequence[str]) -> list[tuple[Build, Compiled]]:
    """Each build for each of the targets that it is for, on all cores."""
    builds = list(builds)
    own = {(build.name, build.backend) for build in builds}
    tasks = [
        (build, target)
        for build, target in itertools.product(builds, targets)
        if build.backend == target
        or (build.backend == TARGETS[target].backend and (build.name, target) not in own)
    ]
    # A kernel cannot be pickled: forked processes inherit the tasks and are told their numbers.
    with multiprocessing.get_context("fork").Pool(initializer=_TASKS.extend, initargs=(tasks,)) as pool:
        results = pool.map(_compile_task, range(len(tasks)), chunksize=1)
    return [(build, compiled) for (build, _), compiled in zip(tasks, results, strict=True)]


_TASKS: list[tuple[Build, str]] = []


def _compile_task(number: int) -> Compiled:
    return compile_build(*_TASKS[number])


def compile_build(build: Build, target: str) -> Compiled:
    """Compile without a GPU."""
    backend, names = TARGETS[target].backend, build.kernel.arg_names
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for name in build.aligned:
        kind = build.signature[name]
        within = [()] if isinstance(kind, str) else [(i,) for i in range(len(kind))]
        aligned |= {(names.index(name), *path): [["tt.divisibility", 16]] for path in within}
    source = ASTSource(
        build.kernel,
        {name: build.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in build.constants.items()},
        aligned,
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    text = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    registers, spilled = _cuda_usage(compiled.asm["cubin"]) if backend == "cuda" else _hip_usage(text)
    return Compiled(
        target,
        registers,
        spilled,
        compiled.metadata.shared,
        wide_loads=len(re.findall(_WIDE_LOADS[backend], text)),
        matrix=len(re.findall(_MATRIX[backend], text)),
        loaded=_loaded(compiled.asm["ttir"]) // (build.num_warps * TARGETS[target].warp_size),
    )


def _loaded(code: str) -> int:
    """Bytes of the largest tile that Triton's code loads."""
    tiles = re.findall(r"tt\.load .*: tensor<([\dx]+)x!tt\.ptr<\D+(\d+)>", code)
    return max((math.prod(map(int, shape.split("x"))) * int(bits) // 8 for shape, bits in tiles), default=0)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _hip_usage(text: str) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory."""
    return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.private_segment_fixed_size:\s+(\d+)", text)


def _number(pattern: str, text: str) -> int:
    (found,) = re.findall(pattern, text)
    return int(found)


HEAD = """\
# What the Triton kernels compile to

Written by `make kernels`, which needs no GPU: registers of a thread / bytes of a thread that found no room in
them / KB of shared memory of a program / instructions that load 16 bytes at once / matrix instructions. An
empty cell: the launcher never asks for that build. sm_80 is an A100, sm_89 an L4, L40 or RTX 40, sm_90 an
H100 or H200, sm_100 a B200, gfx942 an MI300. T tokens of B instances, rank r, n layers on one input; up: of
B, not of A; Q queries of k results.
"""


def table(results: dict[str, list[tuple[Build, Compiled]]]) -> str:
    """As Markdown, a section for each module."""
    lines = [HEAD]
    for module, compiled in results.items():
        lines += [f"## {module}\n", f"| | {' | '.join(TARGETS)} |", "|---|" + "---|" * len(TARGETS)]
        rows: dict[str, dict[str, Compiled]] = {}
        for build, facts in compiled:
            rows.setdefault(build.name, {})[facts.target] = facts
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(str(row.get(target, '')) for target in TARGETS)} |")
        lines.append("")
    return "\n".join(lines)


def main(command: str, *arguments: str) -> int:
    found = modules()
    if command == "names":
        names = [build.name for builds in found.values() for build in builds]
        sys.stdout.write("".join(f"{name}\n" for name in dict.fromkeys(names)))
        return 0
    if command == "check":
        results = {module: compile_all(heaviest(builds), arguments) for module, builds in found.items()}
    else:
        results = {module: compile_all(builds, list(TARGETS)) for module, builds in found.items()}
        with atomic_file(arguments[0]) as part:
            part.write_text(table(results), encoding="utf-8")
    everything = [pair for compiled in results.values() for pair in compiled]
    problems = [problem for build, compiled in everything for problem in compiled.problems(build)]
    sys.stdout.write("".join(f"{line}\n" for line in [*problems, f"{len(everything)} builds compiled"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
