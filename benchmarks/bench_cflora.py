"""cflora_linear against the frozen layer and what users run today: `make bench PYTEST="-k cflora"`.

Before each round of a variant the frozen layer runs on the same inputs, so both see the same state of the
machine: `overhead` is the median of the variant's time over the frozen layer's, less one. Inputs are rotated,
and larger together than the caches. `saved_mb` is what a variant keeps for its backward pass beside frozen
tensors; x counts where it is kept.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import cflora as peers
from sizes import dry
from torch import Tensor

from rellax.ops import cflora_linear, cflora_linears

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, INSTANCES, RANK, ROTATED, ROUNDS = 2048, 8, 8, 4, 40
dry(globals(), TOKENS=4, INSTANCES=2, RANK=2, ROTATED=1, ROUNDS=1)
Run = Callable[..., Any]


def rellax_cflora(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    return cflora_linear(x, weight, None, a, b, gate, scale)


VARIANTS: dict[str, Run] = {
    "rellax": rellax_cflora,
    "published": peers.published_cflora,
    "compiled": peers.compiled_cflora,
    "plain_lora": peers.plain_lora,
    "addmm": peers.addmm_chain,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("d", [2048, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cflora(benchmark: Any, dtype: torch.dtype, d: int, direction: str, variant: str) -> None:
    """A and B are frozen, x and the gate take gradients."""
    inputs = [_inputs(dtype, d, seed) for seed in range(ROTATED)]
    _measure(benchmark, direction, VARIANTS[variant], peers.frozen_linear, inputs)
    passes = 1 if direction == "forward" else 2
    benchmark.extra_info["flops"] = passes * 2 * TOKENS * d * (d + 2 * RANK)
    benchmark.extra_info["bytes"] = passes * dtype.itemsize * (d * d + 2 * TOKENS * d)


def together(x: Tensor, layers: list[dict[str, Any]]) -> list[Tensor]:
    columns = [[layer[name] for layer in layers] for name in ("weight", "a", "b", "gate")]
    weights, loras_a, loras_b, gates = columns
    scale = layers[0]["scale"]
    return list(cflora_linears(x, weights, [None] * len(layers), loras_a, loras_b, gates, scale))


def one_by_one(run: Run) -> Run:
    return lambda x, layers: [run(x, **layer) for layer in layers]


SHARED: dict[str, Run] = {"rellax_shared": together} | {
    name: one_by_one(run) for name, run in VARIANTS.items()
}


@pytest.mark.parametrize("variant", SHARED)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_shared_input(benchmark: Any, direction: str, variant: str) -> None:
    """q, k and v, all of d_in = d_out = 2048 in bf16, from one x."""
    inputs = []
    for seed in range(ROTATED):
        layers = [_inputs(torch.bfloat16, 2048, 3 * seed + i) for i in range(3)]
        x, *_ = [layer.pop("x") for layer in layers]
        inputs.append({"x": x, "layers": layers})
    _measure(benchmark, direction, SHARED[variant], one_by_one(peers.frozen_linear), inputs)


def _measure(benchmark: Any, direction: str, run: Run, frozen: Run, inputs: list[dict[str, Any]]) -> None:
    step = _forward if direction == "forward" else _both
    cycle, frozen_seconds = itertools.cycle(inputs), []

    def setup() -> tuple[tuple[Run, dict[str, Any]], dict[str, Any]]:
        made = next(cycle)
        start = time.perf_counter()
        step(frozen, made)
        frozen_seconds.append(time.perf_counter() - start)
        return (run, made), {}

    benchmark.pedantic(step, setup=setup, rounds=ROUNDS, warmup_rounds=2)
    pairs = zip(benchmark.stats.stats.data, frozen_seconds[-ROUNDS:], strict=True)
    benchmark.extra_info["overhead"] = statistics.median(mine / base for mine, base in pairs) - 1
    benchmark.extra_info["frozen_ms"] = 1e3 * statistics.median(frozen_seconds[-ROUNDS:])
    benchmark.extra_info["saved_mb"] = _saved_bytes(run, inputs[0]) / 2**20


def _saved_bytes(run: Run, inputs: dict[str, Any]) -> int:
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(**inputs)
    frozen = [x for x in _leaves(inputs) if not x.requires_grad]
    for tensor in frozen:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def _leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _inputs(dtype: torch.dtype, d: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    return {
        "x": random(INSTANCES, TOKENS // INSTANCES, d).to(dtype).requires_grad_(),
        "weight": random(d, d).to(dtype),
        "a": random(RANK, d),
        "b": random(d, RANK),
        "gate": random(INSTANCES, RANK, RANK).requires_grad_(),
        "scale": 2.0,
    }


def _forward(run: Run, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        run(**inputs)
    _wait()


def _both(run: Run, inputs: dict[str, Any]) -> None:
    y = run(**inputs)
    outputs = y if isinstance(y, list) else [y]
    wanted = [leaf for leaf in _leaves(inputs) if leaf.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)
    _wait()


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
