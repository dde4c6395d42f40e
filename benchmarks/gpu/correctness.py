"""Every operator with its Triton kernels, forward and backward, against the oracle, its memory full of NaN.

    python -m benchmarks.gpu.correctness                            all, each operator and dtype in a process
    python -m benchmarks.gpu.correctness OPERATOR,... DTYPE [CASES]  the first so many cases, in this process

Cases are those of the tests, all blocks that a launcher can choose among them, and, on a GPU, sizes that
people use. A case that ruins the device for its process takes only its operator's of the same dtype with it.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
"""The independent formulations that the tests take; the others' results are those of the reference."""

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
MANY = (30, 70, 200)
"""Results of a query of history_topk and item_topk: in small blocks, in large ones, and in two passes."""

NEAR = 1e-6
"""Scores of unit rows that sums in another order may swap."""

MEMORY = 8e9
"""Bytes on the GPU that a process takes at most, for the fp64 oracle of a large case."""


def check_all() -> None:
    """Without a GPU one case each, interpreted, in a single process."""
    at_once = 1
    if torch.cuda.is_available():
        tasks = [(*pair, []) for pair in itertools.product(cases.OPERATORS, cases.DTYPES)]
        at_once = max(1, min(os.cpu_count() or 1, 16, int(torch.cuda.mem_get_info()[0] / MEMORY)))
    else:
        tasks = [(",".join(cases.OPERATORS), torch.float32, ["1"])]
    with ThreadPoolExecutor(at_once) as pool:
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
    """Emit a record after each case: how many passed, and the largest part of the tolerance taken up.

    A case for which the GPU has too little memory is skipped.
    """
    os.environ["RELLAX_BACKEND"] = "triton"
    build, table = cases.OPERATORS[operator]
    table = dict(itertools.islice(table.items(), some))
    if some is None:
        table |= cases.CFLORA_BLOCKS if operator == "cflora_linears" else {}
        table |= {"large": LARGE[operator]} if operator in LARGE else {}
    calls = {case: functools.partial(build, dtype, **options) for case, options in table.items()}
    if some is None and operator not in EAGER:
        calls |= {f"large, k = {k}": functools.partial(_large_topk, operator, dtype, k) for k in MANY}
    name, passed, failures, skips, worst = f"{operator} {dtype}".replace("torch.", ""), 0, [], [], 0.0
    for case, inputs in calls.items():
        try:
            worst = max(worst, _compare(operator, inputs(), dtype))
            passed += 1
        except InputError as error:
            emit(name, skipped=str(error))
            return
        except torch.OutOfMemoryError:
            skips.append(f"{operator} {case}: too little memory")
        except Exception as error:  # an AssertionError as well as whatever Triton and CUDA raise
            failures.append(f"{case}: {type(error).__name__}: {error}"[:500])
        emit(name, cases=len(calls), passed=passed, tolerance_used=worst, failures=failures, skips=skips)


def _large_topk(operator: str, dtype: torch.dtype, k: int) -> dict[str, Any]:
    """3,000 items of 512 dimensions; no item is twice in a history."""
    new = torch.Generator().manual_seed(k)
    embeddings = F.normalize(torch.randn(3000, 512, generator=new)).to(cases.device(), dtype)
    if operator == "item_topk":
        return {"embeddings": embeddings, "k": k}
    lengths = (1200, 0, 50, 800)
    items = torch.cat([torch.randperm(3000, generator=new)[:length] for length in lengths])
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    history = {"items": items.to(cases.device()), "offsets": offsets.to(cases.device())}
    return {"embeddings": embeddings, "k": k, **history}


def _compare(operator: str, inputs: dict[str, Any], dtype: torch.dtype) -> float:
    function = getattr(rellax.ops, operator)
    if operator in EAGER:
        return oracle.check(function, _load(EAGER[operator]), inputs, dtype)
    with oracle.poisoned_memory():
        found, scores = function(**inputs)
    os.environ["RELLAX_BACKEND"] = "reference"
    try:
        expected, expected_scores = function(**inputs)
    finally:
        os.environ["RELLAX_BACKEND"] = "triton"
    torch.testing.assert_close(scores, expected_scores)
    assert_same(inputs, found, expected)
    return 0.0


def assert_same(inputs: dict[str, Any], found: Tensor, expected: Tensor) -> None:
    """But for scores so near to one another that sums in another order swap them."""
    apart = (_true_scores(inputs, found) - _true_scores(inputs, expected)).abs()[found != expected]
    assert (apart > 0).all(), "equal scores in another order than the reference's"
    assert (apart < NEAR).all(), f"true scores differ from the reference's by up to {apart.max():.3g}"


def _true_scores(inputs: dict[str, Any], found: Tensor) -> Tensor:
    """In fp64, of what either operator found."""
    table, target = inputs["embeddings"].double(), inputs.get("queries")
    if "items" in inputs:
        items, offsets = inputs["items"], inputs["offsets"]
        users = torch.arange(len(offsets) - 1, device=items.device).repeat_interleave(offsets.diff())
        target = inputs.get("target", items)
        found = items[offsets[inputs.get("user", users)][:, None] + found]
    elif target is None:
        target = torch.arange(len(table), device=table.device)
    return (table @ table.T)[target[:, None], found]


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
