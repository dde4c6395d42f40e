"""What the pipeline costs around the operators: `rellax retrieve`, and the PCA of `rellax embed`.

python benchmarks/scale.py > benchmarks/results/scale-cpu.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from rellax import subr
from rellax._files import sha256_file, write_json
from rellax.ctr import retrieval
from rellax.ctr.buckets import Buckets
from rellax.ctr.runs import environment, peak_memory_gib

FIRST = 5  # behaviours before a user's first sample


def write_data(folder: Path, users: int, items: int, seed: int) -> int:
    """A data folder of log-normal histories, and how many samples it has."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.5, 1.0, users).astype(np.int64), FIRST + 1, 20_000)
    user = np.repeat(np.arange(users, dtype=np.int32), lengths)
    position = (np.arange(len(user)) - np.repeat(lengths.cumsum() - lengths, lengths)).astype(np.int32)
    item = (items * rng.random(len(user)) ** 3).astype(np.int32)  # some are liked by many
    time = rng.integers(1 << 40, size=len(user))
    rows = np.flatnonzero(position >= FIRST)
    rows = rows[np.argsort(time[rows])]
    ids = [str(i) for i in range(max(users, items))]
    tables: dict[str, dict[str, Any]] = {
        "items": {"item": range(items), "item_id": ids[:items], "title": ids[:items], "text": ids[:items]},
        "users": {"user": range(users), "user_id": ids[:users], "profile": ids[:users]},
        "behaviours": {"user": user, "item": item, "rating": np.ones(len(user), np.float32), "time": time},
        "samples": {
            "sample": np.arange(len(rows), dtype=np.int32),
            "user": user[rows],
            "item": item[rows],
            "position": position[rows],
            "label": np.ones(len(rows), np.int8),
            "time": time[rows],
            "split": np.full(len(rows), "train"),
        },
    }
    for name, columns in tables.items():
        pq.write_table(
            pa.table({key: pa.array(column) for key, column in columns.items()}), folder / f"{name}.parquet"
        )
    write_json(folder / "dataset.json", {})
    return len(rows)


class Timer:
    """Seconds spent in functions that it wraps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            started = perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - started

        return timed


def retrieval_costs(users: int, items: int, dim: int, k: int) -> list[str]:
    timer = Timer()
    subr.retrieve = timer("`history_topk`, copies included", subr.retrieve)
    subr.write_retrieved = timer("Parquet of parts and of the result", subr.write_retrieved)
    retrieval.sha256_file = timer("SHA-256 of the inputs", sha256_file)
    Buckets.load = timer("sorting into buckets", Buckets.load)  # type: ignore[method-assign]
    Buckets.read = timer("reading buckets, checks", Buckets.read)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for folder in ("data", "embeddings"):
            (work / folder).mkdir()
        samples = write_data(work / "data", users, items, seed=0)
        table = F.normalize(torch.randn(items, dim, generator=torch.Generator().manual_seed(0)), dim=1)
        subr.save_embeddings(work / "embeddings", table, [str(i) for i in range(items)], "random")
        config = {"data": str(work / "data"), "embeddings": str(work / "embeddings"), "k": k}
        started = perf_counter()
        retrieval.retrieve(config, work / "retrieved", progress=False)
        total = perf_counter() - started
        size = (work / "retrieved" / "retrieved.parquet").stat().st_size / samples
        position = pq.read_table(work / "data" / "samples.parquet", columns=["position"])[
            "position"
        ].to_numpy()
    rest = total - sum(timer.seconds.values())
    candidates = int(position.sum(dtype=np.int64))
    return [
        f"`rellax retrieve`: {samples:,} samples of {users:,} users, {candidates:,} candidates in all, "
        f"{items:,} items x {dim}, K = {k}",
        "",
        "| stage | µs a sample |",
        "|---|---|",
        *(
            f"| {stage} | {seconds / samples * 1e6:.2f} |"
            for stage, seconds in [*timer.seconds.items(), ("rest", rest)]
        ),
        f"| all | {total / samples * 1e6:.2f} |",
        "",
        f"retrieved.parquet: {size:.0f} bytes a sample.",
    ]


def pca_costs(rows: int, size: int, dim: int) -> list[str]:
    block = torch.randn(4096, size, generator=torch.Generator().manual_seed(0))
    blocks = (block + i for i in range(rows // 4096))
    started = perf_counter()
    fitted = subr.PCA.fit(blocks, dim)
    fit = perf_counter() - started
    covariance = torch.cov(block.double().T)
    started = perf_counter()
    torch.linalg.eigh(covariance)
    eigh = perf_counter() - started
    started = perf_counter()
    fitted.project(block)
    project = perf_counter() - started
    return [
        f"PCA of {size} to {dim} dimensions, fp64: covariance {(fit - eigh) / rows * 1e6:.0f} µs an item, "
        f"projection {project / len(block) * 1e6:.0f} µs an item, eigenvectors {eigh:.0f} s once.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=12_000)
    parser.add_argument("--items", type=int, default=62_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--pca-rows", type=int, default=16_384)
    parser.add_argument("--states", type=int, default=4096, help="size of the hidden states")
    options = parser.parse_args()
    machine = environment()
    lines = retrieval_costs(options.users, options.items, options.dim, options.k)
    peak = peak_memory_gib()
    lines += [f"Peak memory of the process so far, the making of the data included: {peak:.1f} GiB.", ""]
    lines += pca_costs(options.pca_rows, options.states, options.dim)
    command = " ".join(["python", *sys.argv])
    print(f"# Around the operators\n\n`{command}`, {machine['threads']} threads of {machine['cpu']}.\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
