"""The Triton kernels of ``rellax::cflora_linear``: tiles, splits and blocks, what they read and write.

``test_cflora.py`` runs all backends against the oracle; here are the paths that its small inputs do not take.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_cflora import naive, naive_set
from test_contracts import Recorder
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rellax.errors import InputError
from rellax.kernels import cflora as kernels
from rellax.kernels._tiles import tile_tokens
from rellax.ops import cflora_linear, cflora_linears, cflora_tiles, cflora_update
from rellax.testing import oracle
from rellax.testing.cases import CFLORA_BLOCKS, CFLORA_LAYERS, CFLORA_SET, cflora, cflora_set, device
from rellax.testing.cases import cflora_update as build_update


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "triton")


def run(function: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs, and the gradients of everything that requires one."""
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    upstream = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [0],
        [0, 0, 0],
        [1],
        [63, 64, 65, 0, 128, 129],
        [0, 500, 0],
        [1] * 100,
        [15, 16, 17, 0, 33],
        [0, 31],
    ],
    ids=str,
)
def test_tiles_cover_every_token_once(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    instances, tokens = len(lengths), sum(lengths)
    table, size = cflora_tiles(offsets, tokens), tile_tokens(tokens, instances)
    before, instance = table[: instances + 1].tolist(), table[instances + 1 :].tolist()
    assert table.dtype == torch.int32
    assert len(instance) == -(-tokens // size) + instances
    covered = []
    for tile, b in enumerate(instance):
        if b == instances:
            assert tile >= before[-1]
            continue
        start = int(offsets[b]) + (tile - before[b]) * size
        run_of_tokens = range(start, min(start + size, int(offsets[b + 1])))
        assert len(run_of_tokens) > 0
        covered += run_of_tokens
    assert covered == list(range(tokens))


def test_tiles_of_another_batch_are_an_error() -> None:
    """A row without a tile would keep what was in memory."""
    inputs = cflora(torch.float32, packed=True, lengths=[7, 1, 129])
    other = cflora_tiles(torch.tensor([0, 70, 137], dtype=torch.int32, device=inputs["x"].device), 137)
    with pytest.raises(InputError, match=r"^tiles: expected cflora_tiles of cu_seqlens = \(10\), int32"):
        cflora_linear(**inputs, tiles=other)
    padded = cflora(torch.float32)
    with pytest.raises(InputError, match=r"^tiles: expected None without cu_seqlens"):
        cflora_linear(**padded, tiles=other)


def test_tiles_are_small_where_instances_are_short() -> None:
    assert [tile_tokens(tokens, 8) for tokens in (0, 255, 256, 10**6)] == [16, 16, 64, 64]


# The interpreter multiplies bf16 bit patterns; a GPU does not.
NARROW = [torch.float16, *([torch.bfloat16] if device().type == "cuda" else [])]


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("case", CFLORA_BLOCKS)
def test_every_block_meets_the_oracle(case: str, dtype: torch.dtype) -> None:
    oracle.check(cflora_linears, naive_set, cflora_set(dtype, **CFLORA_BLOCKS[case]), dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("rank", "layers"), [*CFLORA_LAYERS, (64, 5)])
def test_every_tall_block_of_x_meets_the_oracle(rank: int, layers: int, dtype: torch.dtype) -> None:
    """Of many tokens; five layers of rank 64 take two passes."""
    inputs = cflora_set(dtype, lengths=[4099], d_in=70, d_outs=[1] * layers, r=rank)
    x, factors = inputs["x"].detach()[0], [a.detach() for a in inputs["loras_a"]]
    partial = kernels._new_partial(x, 70, rank, layers)
    kernels._shrink(partial.fill_(torch.nan), x, factors, False, 0.0, None)
    a = torch.cat(factors)
    oracle.check_tensor("h", partial.sum(0), x @ a.T, x.double() @ a.double().T, dtype)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_these_are_all_blocks_that_the_launchers_can_choose(itemsize: int) -> None:
    def blocks(rank: int, layers: int) -> set[tuple[Any, ...]]:
        most = max(kernels._SHRINK) // kernels._padded(rank)
        tables = [(kernels._SHRINK, 64, min(layers, most)), (kernels._SHRINK, 128, min(layers, most))]
        tables += [(kernels._EXPAND, 16, layers), (kernels._EXPAND, 64, layers)]
        return {
            (table is kernels._SHRINK, *kernels._blocks(table, tokens, rank, n, itemsize)[:3])
            for table, tokens, layers in tables
            for n in (1, layers)
        }

    ranks = range(1, kernels.MAX_RANK + 1)
    reachable = ((rank, n) for rank in ranks for n in range(1, 1024 // kernels._padded(rank) + 1))
    assert set().union(*(blocks(*case) for case in CFLORA_LAYERS)) == set().union(
        *(blocks(*case) for case in reachable)
    )


@pytest.mark.parametrize("case", [{}, {"dropout": 0.3}, {"packed": True, "lengths": [3, 0, 4]}], ids=str)
def test_few_tokens_are_split_over_columns(case: dict[str, Any]) -> None:
    """The parts of h and of dy B are added in order by the kernel that reads them."""
    inputs = cflora_set(torch.float32, **{"d_in": 300, "d_outs": (1030, 9), "r": 3, **case})
    rows = inputs["x"].flatten(0, -2)
    assert len(kernels._new_partial(rows, 300, 3, 2)) == 4
    assert len(kernels._new_partial(rows, 1030, 3, 2)) == 8
    oracle.check(cflora_linears, naive_set, inputs, torch.float32)
    for first, second in zip(run(cflora_linears, inputs), run(cflora_linears, inputs), strict=True):
        assert torch.equal(first, second)


def test_many_tokens_are_split_for_the_gradients_of_a_and_b() -> None:
    inputs = cflora(torch.float32, lengths=[2 * 4 * 32 + 5], dropout=0.3)
    assert len(kernels._outer(torch.zeros(261, 4), inputs["x"][0], False, 0.0, None)) == 2
    oracle.check(cflora_linear, naive, inputs, torch.float32)


def test_a_set_gives_the_bits_of_its_layers() -> None:
    """Outputs and the gradients of gates, A and B; dx is added up in another order.

    Bits on a GPU only: the interpreter multiplies with a BLAS that may round another width differently.
    """
    exact = {"rtol": 0.0, "atol": 0.0} if torch.cuda.is_available() else {}
    inputs = cflora_set(torch.float32, dropout=0.3)
    together = run(cflora_linears, inputs)
    plural = {
        "weights": "weight",
        "biases": "bias",
        "loras_a": "lora_a",
        "loras_b": "lora_b",
        "gates": "gate",
    }
    for i in range(3):
        layer = {plural.get(name, name): x[i] if name in plural else x for name, x in inputs.items()}
        y, _, da, db, dgate = run(cflora_linear, layer)
        expected = (together[i], *together[4 + i :: 3])
        for actual, one in zip((y, da, db, dgate), expected, strict=True):
            torch.testing.assert_close(actual, one, **exact)


def test_a_foreign_layer_gives_what_its_own_weight_gives() -> None:
    inputs = cflora(torch.float32, dropout=0.3)
    y = cflora_linear(**inputs)
    weight, bias = inputs.pop("weight"), inputs.pop("bias")
    base = torch.nn.functional.linear(inputs["x"], weight, bias)
    torch.testing.assert_close(cflora_update(base, **inputs), y)


@pytest.mark.parametrize("case", [{}, {"packed": True, "lengths": [7, 0, 33]}], ids=str)
@pytest.mark.parametrize("build", [cflora_set, build_update])
def test_inputs_are_not_written(build: Callable[..., dict[str, Any]], case: dict[str, Any]) -> None:
    function = cflora_linears if build is cflora_set else cflora_update
    inputs = build(torch.float32, **case)
    before = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)
    for result in run(function, inputs):
        assert all(result.data_ptr() != x.data_ptr() for x in tree_leaves(inputs) if isinstance(x, Tensor))
    for x, old in zip(tree_leaves(inputs), tree_leaves(before), strict=True):
        assert torch.equal(x, old) if isinstance(x, Tensor) else x == old


@pytest.mark.parametrize("case", [{}, {"packed": True, "lengths": [7, 0, 33, 1]}, {"r": 17}], ids=str)
def test_nothing_beside_the_inputs_is_read(case: dict[str, Any]) -> None:
    """Between NaNs; what an interpreted kernel multiplies of them, if only to mask it later, is an error."""
    inputs = cflora_set(torch.float32, dropout=0.3, **case)
    expected = run(cflora_linears, inputs)
    guarded = tree_map(between_nans, inputs)
    with np.errstate(invalid="raise"):
        for actual, plain in zip(run(cflora_linears, guarded), expected, strict=True):
            assert torch.equal(actual, plain)


def between_nans(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    room = x.new_full((x.numel() + 2 * 4096,), torch.nan)
    return room[4096:-4096].view(x.shape).copy_(x.detach()).requires_grad_(x.requires_grad)


def test_tensors_need_not_be_contiguous() -> None:
    """A gate shared by all instances, transposed A and B, and the gradient of a sum, which is one number."""
    inputs = cflora(torch.float32, lengths=[5, 5, 5])
    inputs["gate"] = inputs["gate"][0].detach().expand(3, 4, 4).requires_grad_()
    for name in ("lora_a", "lora_b"):
        inputs[name] = inputs[name].detach().t().contiguous().t().requires_grad_()
    leaves = [inputs[name] for name in ("x", "gate", "lora_a", "lora_b")]
    actual, expected = (
        torch.autograd.grad(function(**inputs).sum(), leaves) for function in (cflora_linear, naive)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "needed", [*itertools.combinations(("x", "lora_a", "lora_b", "gate"), 2), ("gate",)], ids=str
)
def test_each_gradient_alone(needed: tuple[str, ...]) -> None:
    inputs = cflora(torch.float32)
    everything = dict(zip(("x", "lora_a", "lora_b", "gate"), run(cflora_linear, inputs)[1:], strict=True))
    some = {
        name: x.detach().requires_grad_(name in needed) if name in everything else x
        for name, x in inputs.items()
    }
    for name, gradient in zip(needed, run(cflora_linear, some)[1:], strict=True):
        assert torch.equal(gradient, everything[name])


def test_too_large_a_rank() -> None:
    with pytest.raises(InputError, match=r"^lora_a: expected a rank"):
        cflora_linear(**cflora(torch.float32, r=65))
    with pytest.raises(InputError, match=r"^lora_a: expected"):
        cflora_linears(**cflora_set(torch.float32, d_outs=[1] * 17, r=33))


@pytest.mark.parametrize("case", ["plain", "packed-dropout"])
def test_contract_and_compiler(case: str) -> None:
    """What `test_contracts.py` asks of the backend that a CPU has by default."""
    inputs = cflora_set(torch.float32, **CFLORA_SET[case])
    with Recorder() as recorder:
        expected = run(cflora_linears, inputs)
    for op, arguments in recorder.calls:
        torch.library.opcheck(op, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, arguments))
    torch._dynamo.reset()
    compiled = torch.compile(cflora_linears, fullgraph=True, backend="aot_eager")
    for actual, eager in zip(run(compiled, inputs), expected, strict=True):
        assert torch.equal(actual, eager)


def test_frozen_factors_cost_one_read_of_dy(monkeypatch: pytest.MonkeyPatch) -> None:
    """dz, dh and the parts of dG come from the one kernel's product with dy; x is not read at all."""
    readers: dict[str, set[int]] = {"_shrink": set(), "_combine": set(), "_outer": set(), "_expand": set()}

    def spy(launcher: Callable[..., Any], seen: set[int], *args: Any) -> Any:
        seen.update(x.data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor))
        return launcher(*args)

    for name, addresses in readers.items():
        monkeypatch.setattr(kernels, name, functools.partial(spy, getattr(kernels, name), addresses))
    inputs = cflora_set(torch.float32, train_lora=False)
    outputs = cflora_linears(**inputs)
    for addresses in readers.values():
        addresses.clear()
    upstream = [torch.ones_like(y) for y in outputs]
    torch.autograd.grad(outputs, [inputs["x"], *inputs["gates"]], upstream)
    for dy in upstream:
        assert [name for name, addresses in readers.items() if dy.data_ptr() in addresses] == ["_shrink"]
    assert all(inputs["x"].data_ptr() not in addresses for addresses in readers.values())


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("case", ["plain", "dropout", "packed"])
def test_is_captured_in_a_cuda_graph(case: str) -> None:
    """Forward and backward; the replay computes on what the inputs hold then."""
    options = {"plain": {}, "dropout": {"dropout": 0.3}, "packed": {"packed": True, "lengths": [7, 0, 33]}}[
        case
    ]
    inputs = cflora_set(torch.bfloat16, **options)
    if case == "packed":
        inputs["tiles"] = cflora_tiles(inputs["cu_seqlens"], len(inputs["x"]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(cflora_linears, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cflora_linears, inputs)
    with torch.no_grad():
        inputs["x"].mul_(-2)
    graph.replay()
    for actual, expected in zip(captured, run(cflora_linears, inputs), strict=True):
        assert torch.equal(actual, expected)


@needs_cuda
def test_nothing_waits_for_the_device() -> None:
    """A packed batch, forward and backward: its table of tiles, too, is made without the offsets."""
    inputs = cflora_set(torch.bfloat16, packed=True, lengths=[7, 0, 33], dropout=0.3)
    run(cflora_linears, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tiles = cflora_tiles(inputs["cu_seqlens"], len(inputs["x"]))
        run(cflora_linears, inputs | {"tiles": tiles})
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_runs_on_the_tensors_own_device() -> None:
    inputs = cflora_set(torch.bfloat16, dropout=0.3)
    expected = run(cflora_linears, inputs)
    other = tree_map(to_second_device, inputs)
    assert torch.cuda.current_device() == 0
    for actual, first in zip(run(cflora_linears, other), expected, strict=True):
        assert actual.device.index == 1
        assert torch.equal(actual.to(first.device), first)


def to_second_device(x: Any) -> Any:
    return x.detach().to("cuda:1").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
