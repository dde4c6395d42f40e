"""item_topk against what users run today: `make bench PYTEST="-k item_topk"`.

62,000 items of D = 512, K = 30: rellax finds the neighbours of all items, a peer those of the first items, as
many as its entry says. Times are per query. Before each round of a peer rellax runs on the same items, and so
does torch's own bf16 product of 8,192 rows by 8,192, the measure of what the machine's GEMM reaches: `ratio`
and `of_gemm_peak` are medians over rounds. rellax computes each pair once; its FLOP/s count that, N² D.

`items`: "random" directions, and "decaying" ones, whose spectrum falls off as after a PCA.
faiss brings an OpenBLAS of its own: where OPENBLAS_CORETYPE or OPENBLAS_L2_SIZE are set, run with `env -u
OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE` as well as with them, and take the faster one.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from peers import item_topk as peers
from sizes import dry
from torch import Tensor

from rellax.ops import item_topk

N, D, K, GEMM = 62_000, 512, 30, 8192
ROUNDS = 3
dry(globals(), N=64, D=8, K=3, GEMM=64, ROUNDS=1)
PEERS: dict[str, tuple[Any, int]] = {
    "faiss_flat": (peers.FaissFlat, 4096),
    "torch_fp32": (peers.Torch, 2048),
    "torch_bf16": (peers.TorchBFloat16, 4096),
    "scikit_learn": (peers.ScikitLearn, 1024),
}
INEXACT = {"torch_bf16"}


@pytest.mark.parametrize("peer", PEERS)
def test_item_topk(benchmark: Any, peer: str) -> None:
    if peer in ("faiss_flat", "scikit_learn"):
        pytest.importorskip({"faiss_flat": "faiss", "scikit_learn": "sklearn"}[peer])
    rows = _items("random")
    make, queries = PEERS[peer]
    search: peers.Search = make(rows)
    recall = _recall(rows, search(rows, queries, K + 1))
    assert recall > (0.9 if peer in INEXACT else 0.9999)  # sums in another order may swap near ties
    clock, gemm = _Clock(), _Gemm(torch.bfloat16)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        gemm.run()
        clock.run(rows)
        return (rows, queries, K + 1), {}

    benchmark.pedantic(search, setup=setup, rounds=ROUNDS, warmup_rounds=0)
    theirs = [seconds / queries for seconds in benchmark.stats.stats.data]
    ratios = [a / b for a, b in zip(theirs, clock.per_query, strict=True)]
    benchmark.extra_info |= clock.report(gemm) | {
        "queries": queries,
        "peer_us_per_query": 1e6 * statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "recall": recall,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("items", ["random", "decaying"])
def test_item_topk_alone(benchmark: Any, items: str, dtype: torch.dtype) -> None:
    rows = _items(items).to(dtype)
    clock, gemm = _Clock(), {name: _Gemm(name) for name in (torch.bfloat16, torch.float32)}

    def setup() -> None:
        for product in gemm.values():
            product.run()

    benchmark.pedantic(clock.run, args=(rows,), setup=setup, rounds=ROUNDS, warmup_rounds=0)
    benchmark.extra_info |= clock.report(gemm[torch.bfloat16])
    benchmark.extra_info["torch_fp32_gemm_gflop_per_s"] = gemm[torch.float32].median()


class _Clock:
    """rellax's time per query, run by run."""

    def __init__(self) -> None:
        self.per_query: list[float] = []

    def run(self, rows: Tensor) -> None:
        start = time.perf_counter()
        item_topk(rows, K)
        self.per_query.append((time.perf_counter() - start) / N)

    def report(self, gemm: _Gemm) -> dict[str, float]:
        speeds = [1e-9 * N * D / seconds for seconds in self.per_query]
        return {
            "rellax_us_per_query": 1e6 * statistics.median(self.per_query),
            "rellax_gflop_per_s": statistics.median(speeds),
            "torch_bf16_gemm_gflop_per_s": gemm.median(),
            "of_gemm_peak": statistics.median(a / b for a, b in zip(speeds, gemm.speeds, strict=True)),
        }


class _Gemm:
    """What torch's product reaches: the best of three, run by run."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.rows = torch.randn(GEMM, D).to(dtype)
        self.out = torch.zeros(GEMM, GEMM, dtype=dtype)
        self.speeds: list[float] = []

    def run(self) -> None:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(self.rows, self.rows.T, out=self.out)
            seconds.append(time.perf_counter() - start)
        self.speeds.append(2e-9 * GEMM**2 * D / min(seconds))

    def median(self) -> float:
        return statistics.median(self.speeds)


def _items(kind: str) -> Tensor:
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    if kind == "decaying":
        rows *= torch.arange(1, D + 1) ** -0.5
    return torch.nn.functional.normalize(rows, dim=1)


def _recall(rows: Tensor, found: Tensor) -> float:
    """The share of rellax's items that the peer found as well."""
    exact, _ = item_topk(rows, K, queries=torch.arange(len(found)))
    return float((exact[:, :, None] == found[:, None, :]).any(2).float().mean())
