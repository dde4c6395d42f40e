"""The fastest static configuration of each kernel on this GPU, beside the present one.

One value of one table is tried at a time, on an operator's forward and backward pass. Only a candidate whose
results agree with the present configuration's counts. On an architecture that the table does not list it is
used on this machine from then on. Another argument of the table in rellax/kernels, such as ``sm_90={…}``,
makes it everybody's.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rellax.ops
from rellax.kernels._tuning import Tuned, architecture
from rellax.testing import cases
from rellax.testing.interpreter import mend_interpreter

from .clock import DEVICE, median_seconds
from .correctness import LARGE
from .records import emit

Changes = dict[Any, Any]

_CFLORA = [*itertools.product((64, 128, 256), (4, 8), (2, 3, 4))]  # bytes of a row, warps, stages
_FASTER = 0.97  # of the present time: what is kept for machines like this one, until a table lists them
_TOLERANCE = 1e-2  # of the largest difference, over the largest value, in bf16


class Trial(NamedTuple):
    """An operator, the table of its kernels, and what to try instead of some of the table's values."""

    operator: str
    table: str
    candidates: Sequence[Changes]
    options: dict[str, Any] = {}  # noqa: RUF012, never written

    @property
    def name(self) -> str:
        keys = ", ".join(str(key) for key in self.candidates[0])
        return f"{self.operator} {self.table}[{keys}]"


FEW_TOKENS = {"lengths": [64] * 8}
TRIALS = (
    *(
        Trial("cflora_linear", f"cflora:{table}", [{key: value} for value in _CFLORA], options)
        for options in ({}, FEW_TOKENS)
        for table, key in (("_SHRINK", 64), ("_EXPAND", 16), ("_OUTER", 32))
    ),
    Trial(
        "soft_prompt",
        "soft_prompt:_ROW",
        [{"bytes": size, "num_warps": n} for size, n in itertools.product((2048, 4096, 8192), (1, 2, 4, 8))],
    ),
    Trial(
        "answer_loss",
        "answer:_BLOCK",
        [{"BLOCK": size, "num_warps": n} for size, n in itertools.product((2048, 4096, 8192), (4, 8, 16))],
    ),
    Trial(
        "gate_bank",
        "gate_bank:_TILE",
        [
            dict(zip(("BLOCK_H", "BLOCK_D", "BLOCK_N"), sizes, strict=True))
            for sizes in itertools.product((16, 32, 64), (16, 32, 64), (32, 64, 128))
        ],
    ),
)


def main() -> None:
    os.environ["RELLAX_BACKEND"] = "triton"
    dry = DEVICE.type != "cuda"
    if dry:
        mend_interpreter()
    for trial in {t.table: t for t in TRIALS}.values() if dry else TRIALS:
        _try(trial._replace(candidates=trial.candidates[:1]) if dry else trial, dry)


def _try(trial: Trial, dry: bool) -> None:
    module, name = trial.table.split(":")
    table: Tuned = getattr(importlib.import_module(f"rellax.kernels.{module}"), name)
    build, _ = cases.OPERATORS[trial.operator]
    sizes = {} if dry else {**LARGE[trial.operator], **trial.options}
    run = _both(getattr(rellax.ops, trial.operator), build(torch.float32 if dry else torch.bfloat16, **sizes))
    expected, present = run(), median_seconds(run)
    seconds, refused = [], []
    for changes in trial.candidates:
        with table.trial(DEVICE, changes):
            try:
                found = run()
                _agree(found, expected)
                seconds.append((median_seconds(run), changes))
            except Exception as error:  # out of registers or shared memory, or results that differ
                refused.append(f"{changes}: {type(error).__name__}: {error}"[:200])
    again = median_seconds(run)
    best, changes = min(seconds, key=lambda pair: pair[0], default=(None, None))
    listed = architecture(DEVICE) in table.architectures
    faster = best is not None and best < _FASTER * min(present, again)
    if faster and not (dry or listed or trial.options):
        table.remember(DEVICE, changes)
    keys = trial.candidates[0]
    emit(
        f"{trial.name} {trial.options or ''}".strip(),
        architecture=architecture(DEVICE),
        present=_text({key: table.on(DEVICE)[key] for key in keys}),
        present_s=[present, again],
        fastest=_text(changes or {}),
        fastest_s=best,
        refused=refused,
    )


def _both(function: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """Forward and backward; outputs and gradients."""
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]

    def run() -> list[Tensor]:
        outputs = [y for y in _outputs(function(**inputs)) if y.requires_grad]
        upstream = [torch.ones_like(y) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    return run


def _outputs(result: Any) -> Iterator[Tensor]:
    yield from result if isinstance(result, tuple) else (result,)


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        difference = (actual.float() - wanted.float()).abs().max().item()
        if not difference <= _TOLERANCE * wanted.float().abs().max().item():
            raise ValueError(f"results differ by {difference:.3g}")


def _text(changes: Changes) -> str:
    return ", ".join(f"{key}: {value}" for key, value in changes.items())


if __name__ == "__main__":
    sys.exit(main())
