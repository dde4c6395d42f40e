"""The operators over many sizes, on the GPU's own clock, beside what users run today.

A record has each variant's median seconds on the GPU, replayed as a CUDA graph, and `eager_s`, when the host
launches what it consists of; where a variant cannot be replayed, or takes long, both are the same. For ours
also the bytes that must move, the operations that must be done and the two rates reached. Sizes that a table
names come first, then one at a time is varied.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import gate_bank, history_topk, item_topk, soft_prompt

from .clock import DEVICE, LONG, median_seconds, replay
from .records import emit
from .sections import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import bench_cflora
from peers import soft_prompt as soft_peers
from peers.cflora import frozen_linear
from sizes import DRY

Run = Callable[[], object]
Found = TypeVar("Found")
DIRECTIONS = ("forward", "both")
NEEDED = ("rellax", "frozen")
"""Variants without which there is no record; the others are peers."""


class Point(NamedTuple):
    """Tokens, d_in = d_out, rank, instances."""

    T: int = 8192
    d: int = 4096
    r: int = 16
    B: int = 8

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


USUAL = Point(32, 32, 4, 2) if DRY else Point()
TOKENS = (16,) if DRY else (128, 512, 2048, 32768, 65536)
RANKS = (2,) if DRY else (4, 8, 32, 64)
INSTANCES = (1,) if DRY else (1, 64, 1024)
POINTS = (
    USUAL,
    *(USUAL._replace(T=tokens) for tokens in TOKENS),
    *(USUAL._replace(r=rank) for rank in RANKS),
    *(USUAL._replace(B=instances) for instances in INSTANCES),
)
PROMPTS = ((2, 8, 16),) if DRY else ((16, 1024, 4096), (8, 448, 576), (64, 1024, 4096))
BANKS = (1, 3) if DRY else (1, 64, 1024)


def main() -> None:
    if DEVICE.type == "cuda":
        os.environ["RELLAX_BACKEND"] = "triton"  # an operator without such a kernel says so
    bandwidth = _copy_bandwidth()
    for B, L, d in PROMPTS:
        _guarded(f"soft_prompt B={B} L={L} d={d}", lambda B=B, L=L, d=d: soft_prompts(B, L, d))
    _guarded("history_topk", histories)
    _guarded("item_topk", item_lists)
    _guarded(f"cflora qkv {USUAL}", lambda: cflora(USUAL, bandwidth, shared=True))
    for point in POINTS:
        _guarded(f"cflora {point}", lambda point=point: cflora(point, bandwidth))
    for B in BANKS:
        _guarded(f"gate_bank B={B}", lambda B=B: gate_banks(B))


def _guarded(name: str, part: Run) -> None:
    """What an operator refuses, and a size that does not fit, are results too."""
    try:
        part()
    except (InputError, torch.OutOfMemoryError) as error:
        emit(f"{name} refused", skipped=str(error)[:300])
    except Exception as error:
        emit(f"{name} failed", failures=[f"{type(error).__name__}: {error}"[:500]])
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def _copy_bandwidth() -> float:
    """Bytes read and written per second."""
    source = torch.randn(2**12 if DRY else 2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def _time(variants: dict[str, Run], moved: float, flops: float) -> dict[str, Any]:
    """Of all variants, each replayed twice in turn: the smaller median; and what ours reaches.

    A peer that cannot be replayed is compared in eager mode, as ours then is; one that fails is left out.
    """
    failed: dict[str, str] = {}

    def each(names: Iterable[str], measure: Callable[[str], Found]) -> dict[str, Found]:
        found = {}
        for name in names:
            try:
                found[name] = measure(name)
            except Exception as error:  # noqa: PERF203, some seconds each
                if name in NEEDED:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:300]
        return found

    eager = each(variants, lambda name: median_seconds(variants[name]))
    graphs = each(eager, lambda name: replay(variants[name]) if eager[name] < LONG else None)
    first = each(graphs, lambda name: median_seconds(graphs[name] or variants[name]))
    second = each(first, lambda name: median_seconds(graphs[name] or variants[name]))
    seconds = {name: min(first[name], again) for name, again in second.items()}
    mine = seconds["rellax"]
    like = {name: eager if graphs[name] is None else seconds for name in seconds if name != "rellax"}
    return {
        "seconds": seconds,
        "eager_s": {name: eager[name] for name in seconds},
        "over_rellax": {name: times[name] / times["rellax"] for name, times in like.items()},
        "failed": failed,
        "bytes": moved,
        "flops": flops,
        "bytes_per_s": moved / mine,
        "flops_per_s": flops / mine,
    }


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def cflora(point: Point, bandwidth: float, shared: bool = False) -> None:
    """A layer on its own, or three that read one x; A and B are frozen, x and the gates take gradients.

    The floor is the time of the bytes that the update must move beside the frozen products, at the copy's
    rate: x and dy read once more, y and dx written once more.
    """
    T, d, r, B = point
    layers, x = 3 if shared else 1, _random(B, T // B, d).requires_grad_()
    made = [
        {
            "weight": _random(d, d) * d**-0.5,
            "a": _random(r, d, dtype=torch.float32) * d**-0.5,
            "b": _random(d, r, dtype=torch.float32),
            "gate": _random(B, r, r, dtype=torch.float32).requires_grad_(),
            "scale": 2.0,
        }
        for _ in range(layers)
    ]
    variants = {"frozen": frozen_linear, **bench_cflora.VARIANTS}
    variants = {name: bench_cflora.one_by_one(run) for name, run in variants.items()}
    if shared:
        variants["rellax"] = bench_cflora.together
    if point != USUAL:
        del variants["compiled"]  # it takes longer to compile than everything else together
    functions = {name: lambda run=run: run(x, made) for name, run in variants.items()}
    wanted, dys = [x, *(layer["gate"] for layer in made)], [_random(*x.shape) for _ in made]
    for direction in DIRECTIONS:
        runs = {name: _direction(function, direction, wanted, dys) for name, function in functions.items()}
        passes = 1 + (direction == "both")
        update = passes * (T * d * (1 + layers)) * x.element_size()  # x, each y; each dy, dx
        moved = update + passes * layers * d * d * x.element_size()
        found = _time(runs, moved, passes * layers * 2 * T * d * (d + 2 * r))
        seconds = found["seconds"]
        base = seconds.pop("frozen")
        found |= {
            "frozen_s": base,
            "overhead": {name: value / base - 1 for name, value in seconds.items()},
            "over_floor": (seconds["rellax"] - base) / (update / bandwidth),
        }
        del found["over_rellax"]["frozen"]
        if found["over_rellax"]:
            found["best_peer_over_rellax"] = min(found["over_rellax"].values())
        if DEVICE.type == "cuda" and direction == "both":
            found["kept_over_tr"] = _kept(functions["rellax"]) / (4 * T * r * layers)
        emit(f"cflora {'qkv ' if shared else ''}{direction} {point}", **found)


def _direction(
    function: Callable[[], list[Tensor]], direction: str, wanted: list[Tensor], dys: list[Tensor]
) -> Run:
    def forward() -> None:
        with torch.no_grad():
            function()

    def both() -> None:
        torch.autograd.grad(function(), wanted, dys, allow_unused=True)

    return forward if direction == "forward" else both


def _kept(function: Callable[[], list[Tensor]]) -> int:
    """Bytes that stay allocated after a forward pass, its outputs aside."""
    before = torch.cuda.memory_allocated()
    outputs = function()
    return torch.cuda.memory_allocated() - before - sum(y.nbytes for y in outputs)


def soft_prompts(B: int, L: int, d: int) -> None:
    """64 placeholders a row; the word table is frozen, the soft rows are trained."""
    vocabulary, places = (64, 2) if DRY else (49152, 64)
    words, rows = _random(vocabulary, d), _random(B * places, d).requires_grad_()
    ids = torch.randint(vocabulary, (B, L), device=DEVICE)
    index = torch.full((B, L), -1, device=DEVICE)
    index[:, 1 :: L // places] = torch.arange(B * places, device=DEVICE).view(B, places)
    functions = {
        "rellax": lambda: [soft_prompt(ids, words, rows, index)],
        "masked_scatter": lambda: [soft_peers.masked_scatter(ids, words, rows, index)],
        "one_assignment": lambda: [soft_peers.one_assignment(ids, words, rows, index)],
        "where": lambda: [soft_peers.where(ids, words, rows, index)],
    }
    dy, row = _random(B, L, d), d * words.element_size()
    for direction in DIRECTIONS:
        runs = {name: _direction(run, direction, [rows], [dy]) for name, run in functions.items()}
        if direction == "forward":
            runs["lookup"] = lambda: F.embedding(ids, words)
        moved = 2 * B * L * row + (direction == "both") * 2 * B * places * row
        emit(f"soft_prompt {direction} B={B} L={L} d={d}", **_time(runs, moved, 0))


def gate_banks(B: int) -> None:
    """As many projections as a 7B-sized Llama adapts with q and v, beside networks one by one and stacked."""
    M, d_u, r = (2, 8, 2) if DRY else (64, 64, 8)
    u, hidden = _random(B, d_u, dtype=torch.float32).requires_grad_(), 2 * r * r
    shapes = [(M, d_u), (M, d_u), (M, hidden, d_u), (M, hidden), (M, r * r, hidden), (M, r * r)]
    bank = [_random(*shape, dtype=torch.float32).mul_(0.1).requires_grad_() for shape in shapes]
    functions = {
        "rellax": lambda: [gate_bank(u, *bank)],
        "one_by_one": lambda: [_perceptrons(u, *bank)],
        "stacked": lambda: [_stacked(u, *bank)],
    }
    dy = _random(M, B, r, r, dtype=torch.float32)
    for direction in DIRECTIONS:
        runs = {name: _direction(run, direction, [u, *bank], [dy]) for name, run in functions.items()}
        passes = 1 + 2 * (direction == "both")
        moved = passes * 4 * (sum(p.numel() for p in bank) + M * B * r * r + B * d_u)
        flops = passes * 2 * M * B * hidden * (d_u + r * r)
        emit(f"gate_bank {direction} M={M} B={B} r={r}", **_time(runs, moved, flops))


def _perceptrons(u: Tensor, *bank: Tensor) -> Tensor:
    gates = []
    for ln_weight, ln_bias, w1, b1, w2, b2 in zip(*bank, strict=True):
        normed = F.layer_norm(u, u.shape[1:], ln_weight, ln_bias)
        gates.append(F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2))
    stacked = torch.stack(gates)
    return stacked.unflatten(-1, 2 * (round(stacked.shape[-1] ** 0.5),))


def _stacked(u: Tensor, *bank: Tensor) -> Tensor:
    ln_weight, ln_bias, b1, b2 = (bank[i][:, None] for i in (0, 1, 3, 5))
    normed = F.layer_norm(u, u.shape[1:]) * ln_weight + ln_bias
    gates = torch.baddbmm(b2, F.gelu(torch.baddbmm(b1, normed, bank[2].mT)), bank[4].mT)
    return gates.unflatten(-1, 2 * (round(gates.shape[-1] ** 0.5),))


def item_lists() -> None:
    """Of 10⁶ items a share of the queries, exact; `all_queries_s` is what all would take at that rate."""
    items, D, k, queries = (64, 8, 3, 16) if DRY else (10**6, 512, 30, 2**14)
    embeddings = F.normalize(_random(items, D, dtype=torch.float32)).bfloat16()
    chosen = torch.arange(queries, device=DEVICE)
    runs: dict[str, Run] = {
        "rellax": lambda: item_topk(embeddings, k, queries=chosen),
        "matmul_topk": lambda: _matmul_topk(embeddings, chosen, k),
    }
    if _faiss_has_gpu():
        index = functools.cache(lambda: _faiss_gpu(embeddings))
        runs["faiss_gpu"] = lambda: index().search(embeddings[chosen].float(), k)
    found = _time(runs, embeddings.nbytes + 12 * queries * k, 2 * queries * items * D)
    found["all_queries_s"] = {name: t * items / queries for name, t in found["seconds"].items()}
    emit(f"item_topk bf16 N={items} D={D} k={k}", **found)


def _matmul_topk(embeddings: Tensor, queries: Tensor, k: int) -> list[Tensor]:
    """In chunks, as a matrix of all scores would not fit."""
    return [torch.topk(embeddings[part] @ embeddings.t(), k).indices for part in queries.split(4096)]


def _faiss_has_gpu() -> bool:
    try:
        import faiss
    except ImportError:
        return False
    return DEVICE.type == "cuda" and hasattr(faiss, "GpuIndexFlatIP")


def _faiss_gpu(embeddings: Tensor) -> Any:
    """An exact index on the GPU that takes tensors."""
    import faiss
    import faiss.contrib.torch_utils

    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True  # half precision for either side
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), embeddings.shape[1], config)
    index.add(embeddings.float())
    return index


def histories() -> None:
    """Sizes of MovieLens-25M, lengths log-normal; every behaviour is a target."""
    users, items, D, k = (3, 20, 8, 3) if DRY else (162541, 62423, 512, 30)
    mean, deviation, longest = (1.0, 0.5, 8) if DRY else (4.3, 1.2, 32202)
    torch.manual_seed(0)
    lengths = torch.randn(users).mul(deviation).add(mean).exp().clamp(1, longest).long()
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(DEVICE)
    total, squares = int(lengths.sum()), int(lengths.square().sum())
    embeddings = F.normalize(_random(items, D, dtype=torch.float32)).bfloat16()
    behaviours = torch.randint(items, (total,), device=DEVICE)
    runs: dict[str, Run] = {"rellax": lambda: history_topk(embeddings, behaviours, offsets, k)}
    moved = embeddings.nbytes + total * (8 + 12 * k)
    emit(f"history_topk bf16 M={total} D={D} k={k}", **_time(runs, moved, squares * D))


if __name__ == "__main__":
    main()
