"""Every operator with its Triton kernels, forward and backward, against the oracle, its memory full of NaN.

    python -m benchmarks.gpu.correctness                            all, each operator and dtype in a process
    python -m benchmarks.gpu.correctness OPERATOR,... DTYPE [CASES]  the first so many cases, in this process

Cases are those of the tests, all blocks that a launcher can choose among them, and, on a GPU, sizes that
people use. A case that ruins the device for its process takes only its operator's of the same dtype with it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import rellax.ops
from rellax.errors import InputError
from rellax.testing import cases, oracle
from rellax.testing.interpreter import mend_interpreter

from .records import emit
from .sections import ROOT

EAGER = {
    "answer_loss": "test_answer:naive",
    "cflora_linear": "test_cflora:naive",
    "cflora_linears": "test_cflora:naive_set",
    "cflora_update": "test_cflora:naive_update",
    "gate_bank": "test_gate_bank:naive",
    "soft_prompt": "test_soft_prompt:naive",
}
"""The independent formulations that the tests take; the others' results are exact."""

LARGE: cases.Table = {
    "answer_loss": {"shape": (16, 8), "vocabulary": 2**17, "d": 1024, "n": 16},
    "cflora_linear": {"lengths": [1024] * 8, "d_in": 4096, "d_out": 4096, "r": 16},
    "cflora_linears": {
        "packed": True,
        "lengths": [1, 2000, 0, 1500, 3000, 1691],
        "d_in": 4096,
        "d_outs": (4096, 1024, 1024),
        "r": 8,
        "dropout": 0.1,
    },
    "gate_bank": {"projections": 64, "instances": 64, "d_u": 64, "r": 16},
    "soft_prompt": {"shape": (16, 1024), "vocabulary": 2**15, "d": 4096, "rows": 1024, "share": 1 / 16},
}


def check_all() -> None:
    """Without a GPU one case each, interpreted, in a single process."""
    if torch.cuda.is_available():
        tasks = [(*pair, []) for pair in itertools.product(cases.OPERATORS, cases.DTYPES)]
    else:
        tasks = [(",".join(cases.OPERATORS), torch.float32, ["1"])]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        list(pool.map(lambda task: _check_apart(*task), tasks))


def _check_apart(operators: str, dtype: torch.dtype, some: list[str]) -> None:
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.gpu.correctness", operators, name, *some]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        last = done.stdout.strip().splitlines()[-3:]
        emit(f"{operators} {name} ended", failures=["\n".join([f"exit status {done.returncode}", *last])])


def check(operator: str, dtype: torch.dtype, some: int | None) -> None:
    """Emit a record after each case: how many passed, and the largest part of the tolerance taken up."""
    os.environ["RELLAX_BACKEND"] = "triton"
    build, table = cases.OPERATORS[operator]
    table = dict(itertools.islice(table.items(), some))
    if some is None:
        table |= cases.CFLORA_BLOCKS if operator == "cflora_linears" else {}
        table |= {"large": LARGE[operator]} if operator in LARGE else {}
    name, passed, failures, worst = f"{operator} {dtype}".replace("torch.", ""), 0, [], 0.0
    for case, options in table.items():
        try:
            worst = max(worst, _compare(operator, build(dtype, **options), dtype))
            passed += 1
        except InputError as error:
            emit(name, skipped=str(error))
            return
        except Exception as error:  # an AssertionError as well as whatever Triton and CUDA raise
            failures.append(f"{case}: {type(error).__name__}: {error}"[:500])
        emit(name, cases=len(table), passed=passed, tolerance_used=worst, failures=failures)


def _compare(operator: str, inputs: dict[str, Any], dtype: torch.dtype) -> float:
    function = getattr(rellax.ops, operator)
    if operator in EAGER:
        return oracle.check(function, _load(EAGER[operator]), inputs, dtype)
    with oracle.poisoned_memory():
        positions, scores = function(**inputs)
    os.environ["RELLAX_BACKEND"] = "reference"
    try:
        expected, expected_scores = function(**inputs)
    finally:
        os.environ["RELLAX_BACKEND"] = "triton"
    assert torch.equal(positions, expected), "positions differ from the reference's"
    torch.testing.assert_close(scores, expected_scores)
    return 0.0


def _load(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def main(arguments: list[str]) -> None:
    if not arguments:
        check_all()
        return
    sys.path.append(str(ROOT / "tests"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend_interpreter()
    operators, dtype, *some = arguments
    for operator in operators.split(","):
        check(operator, getattr(torch, dtype), int(some[0]) if some else None)


if __name__ == "__main__":
    main(sys.argv[1:])
