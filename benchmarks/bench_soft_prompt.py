"""soft_prompt against what users run today and a plain lookup: `make bench PYTEST="-k soft_prompt"`.

Before each round of a peer rellax runs on the same inputs, so both see the same state of the machine: `ratio`
is the median of the peer's time over rellax's. Each runs once more before it is timed, and so finds the free
memory as it leaves it itself: at the small size new pages cost more than what is measured. Word table and
rotated inputs are larger than the caches. The table is frozen, the soft rows are trained.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE, wait
from peers import soft_prompt as peers
from sizes import dry
from torch import Tensor

from rellax.ops import soft_prompt

PLACEHOLDERS, VOCABULARY = 64, 49152
SIZES = {"16x1024x4096": (16, 1024, 4096, 4, 8), "8x448x576": (8, 448, 576, 16, 160)}  # …, rotated, rounds
dry(globals(), PLACEHOLDERS=2, VOCABULARY=16, SIZES={"2x8x16": (2, 8, 16, 2, 2)})
Run = Callable[..., Tensor]

PEERS: dict[str, Run] = {
    "published_loop": peers.published_loop,
    "masked_scatter": peers.masked_scatter,
    "one_assignment": peers.one_assignment,
    "where": peers.where,
}
LOOKUPS: dict[str, Run] = {"lookup": peers.lookup, "ready_lookup": peers.ReadyLookup()}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("size", SIZES)
def test_soft_prompt(benchmark: Any, size: str, direction: str, peer: str) -> None:
    _measure(benchmark, size, _forward if direction == "forward" else _both, PEERS[peer])


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("size", SIZES)
def test_soft_prompt_lookup(benchmark: Any, size: str, lookup: str) -> None:
    _measure(benchmark, size, _forward, LOOKUPS[lookup])


def _measure(benchmark: Any, size: str, step: Callable[..., Any], peer: Run) -> None:
    batch, length, d, rotated, rounds = SIZES[size]
    words = torch.randn(VOCABULARY, d, device=DEVICE).bfloat16()
    inputs = [_inputs(words, batch, length, seed) for seed in range(rotated)]
    if peer not in LOOKUPS.values():
        torch.testing.assert_close(step(peer, *inputs[0]), step(soft_prompt, *inputs[0]))
    cycle, seconds = itertools.cycle(inputs), []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = next(cycle)
        step(soft_prompt, *next(cycle))
        start = time.perf_counter()
        step(soft_prompt, *made)
        seconds.append(time.perf_counter() - start)
        step(peer, *next(cycle))
        return (peer, *made), {}

    benchmark.pedantic(step, setup=setup, rounds=rounds, warmup_rounds=2)
    pairs = zip(benchmark.stats.stats.data, seconds[-rounds:], strict=True)
    benchmark.extra_info["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    benchmark.extra_info["rellax_ms"] = 1e3 * statistics.median(seconds[-rounds:])
    row = d * words.element_size()
    moved = 2 * batch * length * row + (2 * batch * PLACEHOLDERS * row if step is _both else 0)
    benchmark.extra_info["bytes"] = moved
    benchmark.extra_info["rellax_gb_per_s"] = moved / statistics.median(seconds[-rounds:]) / 1e9


def _inputs(words: Tensor, batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    """Token ids, the word table, soft rows, each token's soft row or -1, and the upstream gradient."""
    new = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (batch, length), generator=new)
    index = torch.full((batch, length), -1)
    for b in range(batch):
        placeholders = torch.randperm(length, generator=new)[:PLACEHOLDERS].sort().values
        index[b, placeholders] = torch.arange(PLACEHOLDERS) + b * PLACEHOLDERS
    rows = torch.randn(batch * PLACEHOLDERS, words.shape[1], generator=new).to(words).requires_grad_()
    return (
        ids.to(DEVICE),
        words,
        rows,
        index.to(DEVICE),
        torch.randn(batch, length, words.shape[1], device=DEVICE).to(words),
    )


def _forward(run: Run, *inputs: Tensor) -> Tensor:
    *arguments, _ = inputs
    with torch.no_grad():
        y = run(*arguments)
    wait()
    return y


def _both(run: Run, *inputs: Tensor) -> Tensor:
    *arguments, dy = inputs
    (gradient,) = torch.autograd.grad(run(*arguments), arguments[2], dy)
    wait()
    return gradient
