"""cflora_linear against the frozen layer and what users run today. `make bench` prints the table.

Every variant runs on the same rotated inputs, larger together than the caches. `overhead` in the JSON is the
median over that of the frozen layer in the same run, less one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import cflora as peers
from torch import Tensor

from rellax.ops import cflora_linear

TOKENS, INSTANCES, RANK, ROTATED = 2048, 8, 8, 4
MEDIANS: dict[tuple[Any, ...], float] = {}


def rellax_cflora(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    return cflora_linear(x, weight, None, a, b, gate, scale)


VARIANTS = {
    "frozen": peers.frozen_linear,
    "rellax": rellax_cflora,
    "published": peers.published_cflora,
    "plain_lora": peers.plain_lora,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("d", [2048, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cflora(benchmark: Any, dtype: torch.dtype, d: int, direction: str, variant: str) -> None:
    """A and B are frozen, x and the gates take gradients."""
    run = VARIANTS[variant]
    inputs = itertools.cycle([_inputs(dtype, d, seed) for seed in range(ROTATED)])
    step = _forward if direction == "forward" else _both
    benchmark.pedantic(step, setup=lambda: ((run, next(inputs)), {}), rounds=8, warmup_rounds=2)
    case = (dtype, d, direction)
    MEDIANS[(*case, variant)] = benchmark.stats.stats.median
    passes = 1 if direction == "forward" else 2
    benchmark.extra_info["flops"] = passes * 2 * TOKENS * d * (d + 2 * RANK)
    benchmark.extra_info["bytes"] = passes * dtype.itemsize * (d * d + 2 * TOKENS * d)
    if (*case, "frozen") in MEDIANS:
        benchmark.extra_info["overhead"] = MEDIANS[(*case, variant)] / MEDIANS[(*case, "frozen")] - 1


def _inputs(dtype: torch.dtype, d: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": random(INSTANCES, TOKENS // INSTANCES, d).to(dtype).requires_grad_(),
        "weight": random(d, d).to(dtype),
        "a": random(RANK, d),
        "b": random(d, RANK),
        "gate": random(INSTANCES, RANK, RANK).requires_grad_(),
        "scale": 2.0,
    }


def _forward(run: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        run(**inputs)


def _both(run: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
    y = run(**inputs)
    wanted = [inputs["x"], inputs["gate"]]
    torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
