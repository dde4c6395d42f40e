"""answer_loss against full logits. `make bench PYTEST="-k answer"` prints the table.

B = 16 prompts of L = 1024 tokens with an answer each, V = 2^17, frozen head, forward + backward. On a CPU the
full logits are those of the first four prompts; `seconds_of_all` in the JSON is four times their median.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from device import DEVICE, wait
from memory import apart, peak_growth
from peers import answer as peers
from sizes import dry
from torch import Tensor

from rellax.ops import answer_loss

INSTANCES, LENGTH, HIDDEN, VOCABULARY, ROTATED = 16, 1024, 1024, 2**17, 2
FULL = INSTANCES if DEVICE.type == "cuda" else 4
"""Prompts whose full logits are made at once."""
dry(globals(), INSTANCES=2, LENGTH=4, HIDDEN=8, VOCABULARY=32, FULL=1)


def rellax_vocab(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    return answer_loss(hidden, weight, positions, labels)[0]


def rellax_choice(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    return answer_loss(hidden, weight, positions, labels, choice_ids=(0, 1))[0]


VARIANTS = {
    "rellax_vocab": rellax_vocab,
    "rellax_choice": rellax_choice,
    "gathered": peers.gathered,
    "full_logits": peers.full_logits,
}
if DEVICE.type == "cuda" and find_spec("liger_kernel"):
    VARIANTS["liger"] = peers.liger


@pytest.mark.parametrize("variant", VARIANTS)
def test_answer(benchmark: Any, variant: str) -> None:
    instances = FULL if variant == "full_logits" else INSTANCES
    inputs = itertools.cycle([_inputs(instances, seed) for seed in range(ROTATED)])
    slow = variant == "full_logits" and DEVICE.type == "cpu"
    rounds, warmup_rounds = (2, 0) if slow else (8, 2)
    benchmark.pedantic(
        _step,
        setup=lambda: ((VARIANTS[variant], next(inputs)), {}),
        rounds=rounds,
        warmup_rounds=warmup_rounds,
    )
    benchmark.extra_info["seconds_of_all"] = benchmark.stats.stats.median * INSTANCES / instances
    rows = 2 if variant == "rellax_choice" else VOCABULARY
    benchmark.extra_info["flops"] = 4 * instances * HIDDEN * rows
    benchmark.extra_info["bytes"] = 2 * rows * HIDDEN  # of W, read once


@pytest.mark.parametrize("variant", VARIANTS)
def test_answer_peak_memory(benchmark: Any, variant: str) -> None:
    """The largest growth during a step, the gradient of the hidden states included."""
    instances = FULL if variant == "full_logits" else INSTANCES
    grown = apart(_peak_growth, variant, instances)
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["peak_bytes_of_all"] = grown * INSTANCES // instances
    print(f"\n{variant}: {grown * INSTANCES / instances / 2**20:.1f} MiB")


def _inputs(instances: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    place: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    hidden = torch.empty(instances, LENGTH, HIDDEN, **place).normal_(generator=generator)
    weight = torch.empty(VOCABULARY, HIDDEN, **place).normal_(std=HIDDEN**-0.5, generator=generator)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight,
        "positions": torch.arange(instances, device=DEVICE) * LENGTH + LENGTH - 2,
        "labels": torch.arange(instances, device=DEVICE) % 2,
    }


def _step(run: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    torch.autograd.grad(run(**inputs), inputs["hidden"])
    wait()


def _peak_growth(variant: str, instances: int) -> int:
    """Bytes beyond the inputs, at most."""
    inputs = _inputs(instances, 0)
    _step(VARIANTS["rellax_choice"], _small())  # what a first call loads is no part of a step
    return peak_growth(lambda: _step(VARIANTS[variant], inputs))


def _small() -> dict[str, Tensor]:
    inputs = _inputs(1, 0)
    return {**inputs, "weight": inputs["weight"][:16]}
