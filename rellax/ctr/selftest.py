"""Every operator once, forward and backward at a tiny size, against the reference in fp64.

The tests run in a process of their own, which writes a line for each: a kernel that crashes, hangs or ruins
its device costs its own test alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from rellax import ops
from rellax.ops._register import backend_of
from rellax.reference import history_topk as history_reference
from rellax.reference import item_topk as item_reference

DTYPES = ("float32", "bfloat16")
_UNITS = 16  # of rounding of the largest value that an error may reach: a wrong kernel is off by far more
_TIME_LIMIT = 300.0  # seconds for a test, importing and compiling included


@dataclass(frozen=True)
class Trial:
    """What is tested."""

    operator: str
    device: str
    dtype: str


@dataclass(frozen=True)
class Result:
    """What came of it: `milliseconds` of the second run, `error` in parts of what is allowed.

    `failure` is empty where all is well.
    """

    operator: str
    device: str
    dtype: str
    backend: str = ""
    milliseconds: float | None = None
    error: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class _Case:
    """A call: of the operator under test, and of what says the truth, with the keywords `inputs`."""

    operator: Callable[..., Any]
    truth: Callable[..., Any]
    inputs: dict[str, Any]


def trials(devices: Sequence[str]) -> list[Trial]:
    """All tests for these devices."""
    return [Trial(name, device, dtype) for device in devices for name in CASES for dtype in DTYPES]


def run(todo: Sequence[Trial], *, limit: float = _TIME_LIMIT) -> Iterator[Result]:
    """The result of each test as it comes; what ends the process that it ran in is its failure."""
    left = list(todo)
    while left:
        ending = ""
        with _Child(left, limit) as child:
            for result in child.results():
                yield result
                left.pop(0)
            ending = child.ending()
        if left:
            yield Result(**asdict(left.pop(0)), failure=ending)


def run_one(trial: Trial) -> Result:
    """Run one test in this process."""
    described = asdict(trial)
    try:
        device, dtype = torch.device(trial.device), getattr(torch, trial.dtype)
        described["backend"] = backend_of(trial.operator, device, dtype)
        case = CASES[trial.operator](torch.Generator().manual_seed(0), dtype, device)
        with _reference_backend():
            truth = _differentiated(case.truth, _widened(case.inputs))
        found = _differentiated(case.operator, case.inputs)
        started = perf_counter()
        _differentiated(case.operator, case.inputs)
        milliseconds = 1000 * (perf_counter() - started)
        share, name = max((_error(found[name], value, dtype), name) for name, value in truth.items())
    except Exception as error:  # whatever it is, it is what the doctor has to report
        lines = str(error).strip().splitlines() or [""]
        return Result(**described, failure=f"{type(error).__name__}: {lines[0]}")
    failure = "" if share <= 1 else f"{name} is off by {share:.3g} times what is allowed"
    return Result(**described, milliseconds=milliseconds, error=share, failure=failure)


class _Child:
    """A process that runs tests one after another, and is killed where one takes too long."""

    def __init__(self, todo: Sequence[Trial], limit: float) -> None:
        self.todo, self.limit, self.late = todo, limit, False

    def __enter__(self) -> _Child:
        self.errors = TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rellax.ctr.selftest", json.dumps([asdict(trial) for trial in self.todo])],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def results(self) -> Iterator[Result]:
        stdout = self.process.stdout
        assert stdout is not None
        while True:
            timer = threading.Timer(self.limit, self._stop)
            timer.start()
            try:
                line = stdout.readline()
            finally:
                timer.cancel()
            if not line.endswith("\n"):
                return
            yield Result(**json.loads(line))

    def ending(self) -> str:
        """Why there are no more results, in a few words."""
        code = self.process.wait()
        if self.late:
            return f"no result within {self.limit:g} seconds"
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}" + (f": {said[-1]}" if said and code > 0 else "")

    def _stop(self) -> None:
        self.late = True
        self.process.kill()


def _cflora(random: torch.Generator, dtype: torch.dtype, device: torch.device) -> _Case:
    x, weight, bias = (_randn(random, dtype, device, *shape) for shape in ((2, 5, 24), (17, 24), (17,)))
    lora_a, lora_b, gate = (_leaf(random, dtype, device, *shape) for shape in ((4, 24), (17, 4), (2, 4, 4)))
    inputs = {"x": x.requires_grad_(), "weight": weight, "bias": bias, "scale": 2.0}
    inputs |= {"lora_a": lora_a, "lora_b": lora_b, "gate": gate}
    return _Case(ops.cflora_linear, ops.cflora_linear, inputs)


def _gate_bank(random: torch.Generator, dtype: torch.dtype, device: torch.device) -> _Case:
    shapes = {"u": (3, 8), "ln_weight": (2, 8), "ln_bias": (2, 8), "w1": (2, 18, 8), "b1": (2, 18)}
    shapes |= {"w2": (2, 9, 18), "b2": (2, 9)}
    inputs = {name: _leaf(random, dtype, device, *shape) for name, shape in shapes.items()}
    return _Case(ops.gate_bank, ops.gate_bank, inputs)


def _soft_prompt(random: torch.Generator, dtype: torch.dtype, device: torch.device) -> _Case:
    ids = torch.randint(9, (2, 7), generator=random)
    index = torch.where(ids < 3, ids, -1)
    inputs = {
        "input_ids": ids.to(device),
        "word_embeddings": _leaf(random, dtype, device, 9, 20),
        "soft_rows": _leaf(random, dtype, device, 3, 20),
        "soft_index": index.to(device),
    }
    return _Case(ops.soft_prompt, ops.soft_prompt, inputs)


def _answer_loss(random: torch.Generator, dtype: torch.dtype, device: torch.device) -> _Case:
    inputs = {
        "hidden": _leaf(random, dtype, device, 3, 6, 16),
        "lm_head_weight": _leaf(random, dtype, device, 33, 16),
        "positions": torch.tensor([4, 11, 17], device=device),
        "labels": torch.tensor([5, 8, 5], device=device),
        "choice_ids": (5, 8),
        "loss": "vocab",
    }
    return _Case(ops.answer_loss, ops.answer_loss, inputs)


def _history_topk(random: torch.Generator, dtype: torch.dtype, device: torch.device) -> _Case:
    inputs = {
        "embeddings": _randn(random, dtype, device, 30, 16),
        "items": torch.randperm(30, generator=random).to(device),
        "offsets": torch.tensor([0, 12, 30], device=device),
        "target": torch.tensor([3, 8, 20], device=device),
        "user": torch.tensor([0, 1, 1], device=device),
        "end": torch.tensor([2, 9, 18], device=device),
        "k": 4,
    }
    return _Case(ops.history_topk, history_reference.history_topk, inputs)


def _item_topk(random: torch.Generator, dtype: torch.dtype, device: torch.device) -> _Case:
    def truth(embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return item_reference.item_topk(embeddings, None, k, True)

    return _Case(ops.item_topk, truth, {"embeddings": _randn(random, dtype, device, 30, 16), "k": 4})


CASES: dict[str, Callable[[torch.Generator, torch.dtype, torch.device], _Case]] = {
    "cflora_linear": _cflora,
    "gate_bank": _gate_bank,
    "soft_prompt": _soft_prompt,
    "answer_loss": _answer_loss,
    "history_topk": _history_topk,
    "item_topk": _item_topk,
}


def _randn(random: torch.Generator, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random).to(device, dtype)


def _leaf(random: torch.Generator, dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return _randn(random, dtype, device, *shape).requires_grad_()


def _widened(inputs: dict[str, Any]) -> dict[str, Any]:
    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: widen(value) for name, value in inputs.items()}


@contextlib.contextmanager
def _reference_backend() -> Iterator[None]:
    """Within: plain PyTorch, whatever the environment asks for."""
    before = os.environ.get("RELLAX_BACKEND")
    os.environ["RELLAX_BACKEND"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RELLAX_BACKEND"]
        else:
            os.environ["RELLAX_BACKEND"] = before


def _differentiated(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and gradients of the first one's sum, on the CPU."""
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {place}": output.detach().cpu() for place, output in enumerate(outputs)}
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    if leaves:
        first = outputs[0]
        gradients = torch.autograd.grad(first, list(leaves.values()), torch.ones_like(first))
        found |= {f"the gradient of {name}": g.cpu() for name, g in zip(leaves, gradients, strict=True)}
    return found


def _error(found: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The largest error in parts of what is allowed; of integers, whether any differs."""
    if not truth.is_floating_point():
        return 0.0 if torch.equal(found, truth) else float("inf")
    finite = truth.isfinite()
    if found.shape != truth.shape or not torch.equal(found.isfinite(), finite):
        return float("inf")
    truth, found = truth[finite], found[finite].double()
    allowed = _UNITS * torch.finfo(dtype).eps * float(truth.abs().max())
    return float((found - truth).abs().max()) / (allowed or 1.0)


def _main() -> None:
    for described in json.loads(sys.argv[1]):
        sys.stdout.write(json.dumps(asdict(run_one(Trial(**described)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
