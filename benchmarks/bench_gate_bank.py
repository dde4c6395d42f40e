"""The gates of 64 projections against as many small perceptrons: `make bench PYTEST="-k gate_bank"`.

r = 8, d_u = 64; the forward pass alone, or with the backward pass to u and all parameters. Three sets of
parameters take turns, larger together than a core's cache. Freed memory is kept, as in bench_cflora.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE, wait
from memory import keep_freed_memory
from peers import gate_bank as peers
from sizes import dry
from torch import Tensor, nn

from rellax.nn import GateBank

PROJECTIONS, RANK, EMBEDDING, ROTATED, ROUNDS = 64, 8, 64, 3, 60
dry(globals(), PROJECTIONS=2, RANK=2, EMBEDDING=8, ROTATED=1, ROUNDS=1)


@pytest.fixture(autouse=True, scope="module")
def _keep_freed_memory() -> None:
    keep_freed_memory()


def rellax_bank(projections: int, rank: int, d_u: int, dtype: torch.dtype) -> nn.Module:
    return GateBank(projections, rank, d_u, gate_init="kaiming", dtype=dtype)


VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "rellax": rellax_bank,
    "small_mlps": peers.SmallMLPs,
    "stacked": peers.StackedMLPs,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("instances", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gate_bank(benchmark: Any, dtype: torch.dtype, instances: int, direction: str, variant: str) -> None:
    torch.manual_seed(0)
    banks = [VARIANTS[variant](PROJECTIONS, RANK, EMBEDDING, dtype).to(DEVICE) for _ in range(ROTATED)]
    u = torch.randn(instances, EMBEDDING, dtype=dtype, device=DEVICE).requires_grad_()
    step, cycle = _forward if direction == "forward" else _both, itertools.cycle(banks)
    benchmark.pedantic(step, setup=lambda: ((next(cycle), u), {}), rounds=ROUNDS, warmup_rounds=6)
    parameters = sum(parameter.numel() for parameter in banks[0].parameters())
    passes = 1 if direction == "forward" else 3  # the backward pass multiplies twice, and writes gradients
    benchmark.extra_info["flops"] = passes * 2 * instances * parameters
    benchmark.extra_info["bytes"] = passes * dtype.itemsize * parameters


def _forward(bank: nn.Module, u: Tensor) -> None:
    with torch.no_grad():
        bank(u)
    wait()


def _both(bank: nn.Module, u: Tensor) -> None:
    gates = bank(u)
    gates = [gates] if isinstance(gates, Tensor) else gates
    torch.autograd.grad(gates, [u, *bank.parameters()], [torch.ones_like(gate) for gate in gates])
    wait()
