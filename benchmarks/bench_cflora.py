"""cflora_linear against the frozen layer and what users run today: `make bench PYTEST="-k cflora"`.

Before each round of a variant the frozen layer runs on the same inputs, so both see the same state of the
machine: `overhead` is the median of the variant's time over the frozen layer's, less one, `overhead_q1` and
`overhead_q3` are its quartiles, `overhead_ms` is the median of the difference. Inputs are rotated, and larger
together than the caches. Freed memory is kept, so that no variant waits for the system to hand out pages.
`saved_mb` is what a variant keeps for its backward pass beside frozen tensors; x counts where it is kept.
`bytes` and `flops` are those of the layer with its update. On a GPU `floor` is the least overhead of each
way to split the update from the product (docs/cflora.md), at the bandwidth and FLOP/s measured there,
`floor_h200` at an H200's; on a CPU the variant `row_passes` is measured instead.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import floors
import pytest
import torch
from device import DEVICE, wait
from memory import keep_freed_memory
from peers import cflora as peers
from sizes import dry
from torch import Tensor

from rellax.ops import cflora_linear, cflora_linears

TOKENS, INSTANCES, RANK, ROTATED, ROUNDS = 2048, 8, 8, 4, 40
dry(globals(), TOKENS=4, INSTANCES=2, RANK=2, ROTATED=1, ROUNDS=1)
Run = Callable[..., Any]
GPU = DEVICE.type == "cuda"


class Shape(NamedTuple):
    """T tokens of B instances, layers of d_in = d_out = d, rank r."""

    tokens: int
    d: int
    rank: int
    instances: int

    def __str__(self) -> str:
        return f"T{self.tokens}-d{self.d}-r{self.rank}-B{self.instances}"


def _gpu_shapes() -> list[Shape]:
    """The headline, then tokens, ranks and instances one after another."""
    headline = Shape(8192, 4096, 16, 8)
    sweep = [headline._replace(tokens=2**n) for n in range(7, 17)]
    sweep += [headline._replace(rank=rank) for rank in (4, 8, 32, 64)]
    sweep += [headline._replace(instances=instances) for instances in (1, 64, 1024)]
    return list(dict.fromkeys([headline, *sweep]))


CPU_SHAPES = [Shape(TOKENS, d, RANK, INSTANCES) for d in (2048, 4096)]
SHAPES = _gpu_shapes() if GPU else CPU_SHAPES
SHARED_SHAPE = Shape(8192, 4096, 16, 8) if GPU else CPU_SHAPES[0]
DTYPES = [torch.bfloat16] if GPU else [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True, scope="module")
def _keep_freed_memory() -> None:
    keep_freed_memory()


def rellax_cflora(x: Tensor, weight: Tensor, *, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    return cflora_linear(x, weight, None, a, b, gate, scale)


VARIANTS: dict[str, Run] = {
    "rellax": rellax_cflora,
    "published": peers.published_cflora,
    "compiled": peers.compiled_cflora,
    "plain_lora": peers.plain_lora,
    "addmm": peers.addmm_chain,
}
if find_spec("peft"):
    VARIANTS |= {"peft": peers.peft_lora, "peft_narrow": peers.peft_lora_narrow}
if GPU:
    from peers.lorafusion import lorafusion

    VARIANTS["lorafusion"] = lorafusion
else:
    VARIANTS["row_passes"] = peers.row_passes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: {2: "bf16", 4: "fp32"}[dtype.itemsize])
def test_cflora(benchmark: Any, dtype: torch.dtype, shape: Shape, direction: str, variant: str) -> None:
    """A and B are frozen, x and the gate take gradients."""
    inputs = [_inputs(dtype, shape, seed) for seed in range(ROTATED)]
    _measure(benchmark, direction, VARIANTS[variant], peers.frozen_linear, inputs, shape.d)
    _count(benchmark, shape, dtype, direction, layers=1)


def together(x: Tensor, layers: list[dict[str, Any]]) -> list[Tensor]:
    columns = [[layer[name] for layer in layers] for name in ("weight", "a", "b", "gate")]
    weights, loras_a, loras_b, gates = columns
    scale = layers[0]["scale"]
    return list(cflora_linears(x, weights, [None] * len(layers), loras_a, loras_b, gates, scale))


def one_by_one(run: Run) -> Run:
    return lambda x, layers: [run(x, **layer) for layer in layers]


SHARED: dict[str, Run] = {"rellax_shared": together} | {
    name: one_by_one(run) for name, run in VARIANTS.items() if name != "row_passes"
}


@pytest.mark.parametrize("variant", SHARED)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_shared_input(benchmark: Any, direction: str, variant: str) -> None:
    """q, k and v in bf16, from one x."""
    inputs = []
    for seed in range(ROTATED):
        layers = [_inputs(torch.bfloat16, SHARED_SHAPE, 3 * seed + i) for i in range(3)]
        x, *_ = [layer.pop("x") for layer in layers]
        inputs.append({"x": x, "layers": layers})
    _measure(benchmark, direction, SHARED[variant], one_by_one(peers.frozen_linear), inputs, SHARED_SHAPE.d)
    _count(benchmark, SHARED_SHAPE, torch.bfloat16, direction, layers=3)


def _measure(
    benchmark: Any, direction: str, run: Run, frozen: Run, inputs: list[dict[str, Any]], d: int
) -> None:
    """Fewer rounds of what takes longer."""
    torch._dynamo.reset()  # after a few other sizes, `compiled` would silently be eager
    rounds = max(1, ROUNDS * 2048 // d)
    step = _forward if direction == "forward" else _both
    cycle, frozen_seconds = itertools.cycle(inputs), []

    def setup() -> tuple[tuple[Run, dict[str, Any]], dict[str, Any]]:
        made = next(cycle)
        start = time.perf_counter()
        step(frozen, made)
        frozen_seconds.append(time.perf_counter() - start)
        return (run, made), {}

    benchmark.pedantic(step, setup=setup, rounds=rounds, warmup_rounds=rounds // 4)
    pairs = list(zip(benchmark.stats.stats.data, frozen_seconds[-rounds:], strict=True))
    q1, median, q3 = _quartiles([mine / base - 1 for mine, base in pairs])
    benchmark.extra_info.update(
        overhead=median,
        overhead_q1=q1,
        overhead_q3=q3,
        overhead_ms=1e3 * statistics.median(mine - base for mine, base in pairs),
        frozen_ms=1e3 * statistics.median(frozen_seconds[-rounds:]),
        saved_mb=_saved_bytes(run, inputs[0]) / 2**20,
        threads=torch.get_num_threads(),
    )


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values


def _count(benchmark: Any, shape: Shape, dtype: torch.dtype, direction: str, layers: int) -> None:
    """Bytes and FLOPs of the layers with their updates, and on a GPU the floors of the overhead."""
    tokens, d, rank, _ = shape
    sizes = (tokens, d, d, rank, layers, dtype.itemsize)
    passes = [floors.forward] if direction == "forward" else [floors.forward, floors.backward]
    products = len(passes) * layers
    product = floors.Floor(dtype.itemsize * (d * d + 2 * tokens * d), 2 * tokens * d * d)
    counted = [one_pass("C", *sizes) for one_pass in passes]
    benchmark.extra_info["bytes"] = products * product.bytes + sum(floor.bytes for floor in counted)
    benchmark.extra_info["flops"] = products * product.flops + sum(floor.flops for floor in counted)
    if not GPU:
        return
    for name, ceilings in (("floor", floors.measured(DEVICE)), ("floor_h200", floors.H200)):
        base = products * product.seconds(ceilings)
        benchmark.extra_info[name] = {
            split: sum(one_pass(split, *sizes).seconds(ceilings) for one_pass in passes) / base
            for split in floors.OUTPUT_PASSES
        }


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


def _inputs(dtype: torch.dtype, shape: Shape, seed: int) -> dict[str, Any]:
    (tokens, d, rank, instances), generator = shape, torch.Generator(DEVICE).manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE)

    return {
        "x": random(instances, tokens // instances, d).to(dtype).requires_grad_(),
        "weight": random(d, d).to(dtype),
        "a": random(rank, d),
        "b": random(d, rank),
        "gate": random(instances, rank, rank).requires_grad_(),
        "scale": 2.0,
    }


def _forward(run: Run, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        run(**inputs)
    wait()


def _both(run: Run, inputs: dict[str, Any]) -> None:
    y = run(**inputs)
    outputs = y if isinstance(y, list) else [y]
    wanted = [leaf for leaf in _leaves(inputs) if leaf.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)
    wait()
