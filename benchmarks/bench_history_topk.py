"""history_topk against what users run today: `make bench PYTEST="-k history_topk"` prints the table.

D = 512, K = 30, fp32 unit rows, no item twice in a history:

- every: like MovieLens-25M, 62,000 items, 162,541 users, log-normal histories of 20 to 2,500 (median 71, mean
  about 150), every behaviour a target: 24.6 M samples, and 10 GiB of memory. Popularity falls as
  (rank + 300)^-2, so that, as there, half of the items have some ten behaviours, and 10,000 have 100 or more.
  On a GPU a tenth of the users, as a CPU makes their histories; `benchmarks.gpu.sweep` has them all.
- part: the first 1,500 users of it, in a call of their own.
- small: like MovieLens-1M, 3,706 items, 6,040 users, histories of 20 to 2,314; every behaviour is a target.
- cold: 4,000 users with histories of 1,000 of 62,000 items, and one target for each.

Before each round of a peer rellax runs on the whole workload; peers run on random samples of it, or on its
first users, and `ratio` compares times per sample. Ids are compared first, up to ties within fp32 rounding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from device import DEVICE, wait
from memory import apart, peak_growth
from peers import history_topk as peers
from sizes import dry
from torch import Tensor

from rellax.ops import history_topk

D, K, ROUNDS = 512, 30, 5
USERS = 16_254 if DEVICE.type == "cuda" else 162_541
# Items, users, and their longest history.
EVERY, SMALL, COLD = (62_000, USERS, 2_500), (3_706, 6_040, 2_314), (62_000, 4_000, 1_000)
PART = 1_500  # users
dry(globals(), D=8, K=3, ROUNDS=1, EVERY=(64, 4, 40), SMALL=(64, 5, 40), COLD=(64, 6, 30), PART=2)


class Workload(NamedTuple):
    embeddings: Tensor
    items: Tensor
    offsets: Tensor
    queries: dict[str, Tensor]
    """target, user and end; empty where every behaviour is a target."""

    def first(self, users: int) -> Workload:
        return self._replace(items=self.items[: int(self.offsets[users])], offsets=self.offsets[: users + 1])

    def all_queries(self) -> tuple[Tensor, ...]:
        if self.queries:
            return tuple(self.queries.values())
        user = torch.arange(len(self.offsets) - 1, device=DEVICE).repeat_interleave(self.offsets.diff())
        return self.items, user, torch.arange(len(self.items), device=DEVICE) - self.offsets[user]


def run_rellax(work: Workload) -> tuple[Tensor, Tensor]:
    return history_topk(work.embeddings, work.items, work.offsets, K, **work.queries)


@cache
def every() -> Workload:
    items, users, longest = EVERY
    popularity = (torch.arange(items) + 300).double() ** -2
    return _workload(popularity, _log_normal(users, median=71, sigma=1.24, longest=longest))


def part() -> Workload:
    return every().first(PART)


@cache
def small() -> Workload:
    items, users, longest = SMALL
    return _workload(_zipf(items), _log_normal(users, median=96, sigma=1.04, longest=longest))


@cache
def cold() -> Workload:
    items, users, length = COLD
    work = _workload(_zipf(items), torch.full((users,), length))
    target = torch.randint(items, (users,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    user = torch.arange(users, device=DEVICE)
    return work._replace(queries={"target": target, "user": user, "end": torch.full_like(user, length)})


CASES: dict[str, tuple[Callable[[], Workload], Callable[[Workload], Callable[..., Tensor]], int | None]] = {
    "every-published_loop": (every, lambda _: peers.published_loop, 2_000),
    "every-torch_loop": (every, lambda _: peers.torch_loop, 2_000),
    "every-per_user_torch": (every, lambda _: peers.per_user_torch, None),
    "part-per_user_torch": (part, lambda _: peers.per_user_torch, None),
    "small-published_walk": (small, lambda work: peers.NeighbourWalk(*work[:2], published=True), 1_000),
    "small-integer_walk": (small, lambda work: peers.NeighbourWalk(*work[:2], published=False), 2_000),
    "cold-published_loop": (cold, lambda _: peers.published_loop, 500),
    "cold-torch_loop": (cold, lambda _: peers.torch_loop, 500),
    "cold-gather_faiss_knn": (cold, lambda _: peers.gather_faiss_knn, 300),
    "cold-faiss_selector": (cold, lambda work: peers.faiss_selector(work.embeddings), 300),
}
"""Workload, peer, and how many random samples the peer gets; None: all of the first PART users."""


@pytest.mark.parametrize("case", CASES)
def test_history_topk(benchmark: Any, case: str) -> None:
    if DEVICE.type == "cuda" and any(name in case for name in ("faiss", "walk", "published")):
        pytest.skip("the peer runs on a CPU")
    if "faiss" in case:
        pytest.importorskip("faiss")
    make, make_peer, samples = CASES[case]
    work = make()
    peer, queries = make_peer(work), work.all_queries()
    total = len(queries[0])
    peers_work = work if samples else work.first(PART)
    chosen = _sample(total, samples) if samples else torch.arange(len(peers_work.items))
    arguments = (*peers_work[:3], K, *(query[chosen.to(DEVICE)] for query in queries))
    _assert_same(work, queries, chosen, peer(*arguments))
    seconds: list[float] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        start = time.perf_counter()
        run_rellax(work)
        wait()
        seconds.append((time.perf_counter() - start) / total)
        return arguments, {}

    def run(*given: Any) -> None:
        peer(*given)
        wait()

    benchmark.pedantic(run, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    ours = seconds[-ROUNDS:]
    theirs = [one / len(chosen) for one in benchmark.stats.stats.data]
    candidates = int(queries[2].sum())
    benchmark.extra_info.update(
        ratio=statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        us_per_sample=1e6 * statistics.median(ours),
        us_per_sample_of_peer=1e6 * statistics.median(theirs),
        seconds_of_all=total * statistics.median(ours),
        samples=total,
        samples_of_peer=len(chosen),
        candidates_per_sample=candidates / total,
        flops=2 * D * candidates,
        bytes=4 * D * len(work.items) + 12 * K * total,
    )
    info = benchmark.extra_info
    print(f"\n{case}: {info['us_per_sample']:.3f} us a sample, {info['ratio']:.1f} x", info)


def test_history_topk_peak_memory(benchmark: Any) -> None:
    """The largest growth during a call beyond its outputs."""
    beyond = apart(_peak_beyond_outputs, every())
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["peak_bytes_beyond_outputs"] = beyond
    print(f"\npeak beyond inputs and outputs: {beyond / 2**20:.1f} MiB")


def _workload(popularity: Tensor, lengths: Tensor) -> Workload:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(len(popularity), D, generator=generator), dim=1)
    share = popularity[torch.randperm(len(popularity), generator=generator)].cumsum(0).numpy()
    share /= share[-1]
    random = np.random.default_rng(0)
    histories = [_without_repetition(share, int(n), random) for n in lengths]
    offsets = torch.tensor([0, *lengths.tolist()]).cumsum(0)
    items = torch.from_numpy(np.concatenate(histories))
    return Workload(embeddings.to(DEVICE), items.to(DEVICE), offsets.to(DEVICE), {})


def _zipf(items: int) -> Tensor:
    return torch.arange(1, items + 1).double() ** -0.8


def _without_repetition(share: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Items drawn by popularity, of which `share` has the running sum, one after the other."""
    drawn = np.empty(0, np.int64)
    first = drawn
    while len(first) < count:
        drawn = np.concatenate([drawn, np.searchsorted(share, random.random(2 * count))])
        first = np.sort(np.unique(drawn, return_index=True)[1])
    return drawn[first[:count]]


def _log_normal(users: int, *, median: float, sigma: float, longest: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    lengths = (math.log(median) + sigma * torch.randn(users, generator=generator)).exp()
    return lengths.long().clamp(20, longest)


def _sample(total: int, count: int) -> Tensor:
    return torch.randperm(total, generator=torch.Generator().manual_seed(3))[:count]


def _assert_same(work: Workload, queries: tuple[Tensor, ...], chosen: Tensor, theirs: Tensor) -> None:
    """The same positions, or, where the order is a matter of rounding, others of the same scores."""
    ours = run_rellax(work)[0][chosen.to(DEVICE)]
    assert ours.shape == theirs.shape
    for row in (ours != theirs.to(DEVICE)).any(1).nonzero().flatten().tolist():
        target, user = (int(query[chosen[row]]) for query in queries[:2])
        found = [positions[row][positions[row] >= 0] for positions in (ours, theirs.to(DEVICE))]
        history = work.items[work.offsets[user] :]
        scores = [(work.embeddings[history[f]].double() @ work.embeddings[target].double()) for f in found]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-6)


def _peak_beyond_outputs(work: Workload) -> int:
    embeddings, items, offsets = (part.clone() for part in work[:3])  # they came as shared memory
    work = Workload(embeddings, items, offsets, {})
    run_rellax(work.first(1))
    outputs = len(work.items) * K * 12
    return peak_growth(lambda: run_rellax(work)) - outputs
