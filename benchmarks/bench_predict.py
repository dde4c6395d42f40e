"""Prediction as a service does it, against the published way: `make bench PYTEST="-k bench_predict"`.

A request is rows with the ids of users and items, answered by `Predictor.predict`: histories, retrieval, the
classical recommender's hidden layer, prompts and the model. Before each round the published way answers the
same rows: padded, logits of all positions, gates and soft rows computed anew. What it needs beside the model
(retrieved behaviours, prompts' tokens, hidden layer) it gets ready-made, as it computes these offline; and so
does the floor, the frozen decoder's forward pass alone over packed prompts. Ratios are medians over rounds.

SmolLM2-135M reads MovieLens-100K, with random adapters and item embeddings: they cost what trained ones do.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_step import _prepared
from device import DEVICE
from peers.step import FrozenBody, PublishedModel, sharing
from sizes import DRY, dry

from rellax.ctr.batches import Collator, Example, on_device
from rellax.ctr.config import TrainConfig
from rellax.patch import save_adapter

KS = (10, 30)
ROUNDS = {1: 40, 8: 10, 32: 4, 64: 3}
"""By rows in a request."""
CLIENTS, REQUESTS = 8, 5
DIM = 512
dry(globals(), KS=(2,), ROUNDS={1: 2, 3: 1}, CLIENTS=2, REQUESTS=2, DIM=4)

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", params=KS, ids="k{}".format)
def contest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Contest:
    pytest.importorskip("fuxictr")
    return Contest(request.param, tmp_path_factory.mktemp("predict"))


@pytest.mark.parametrize("rows", ROUNDS)
def test_predict(benchmark: Any, contest: Contest, rows: int) -> None:
    contest.predictor.batch_size = rows
    asked = itertools.cycle(contest.requests(rows))
    seconds: dict[str, list[float]] = {"published": [], "floor": [], "rellax": []}

    def run(request: Rows) -> None:
        seconds["rellax"].append(_timed(contest.predictor.predict, request))

    def peers(request: Rows) -> None:
        prompts = contest.prompts(request)
        seconds["published"].append(_timed(contest.published, prompts))
        seconds["floor"].append(_timed(contest.floor, prompts))

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        request = next(asked)
        peers(request)
        return (request,), {}

    for warm_up in (peers, run):
        warm_up(next(asked)[:2])
    for values in seconds.values():
        values.clear()
    benchmark.pedantic(run, setup=setup, rounds=ROUNDS[rows])
    for name, values in seconds.items():
        benchmark.extra_info |= {
            f"{name}_p50_ms": 1e3 * statistics.median(values),
            f"{name}_p95_ms": 1e3 * float(np.percentile(values, 95)),
            f"{name}_rows_per_s": rows / statistics.median(values),
        }
    for name in ("published", "floor"):
        ratios = [other / ours for other, ours in zip(seconds[name], seconds["rellax"], strict=True)]
        benchmark.extra_info[f"{name}_over_rellax"] = statistics.median(ratios)
    benchmark.extra_info["load_s"] = contest.load_s


def test_threads(benchmark: Any, contest: Contest) -> None:
    """Clients that ask for one row at a time, each in a thread: do shared batches pay?"""
    predictor, requests = contest.predictor, contest.requests(1)[: CLIENTS * REQUESTS]
    predictor.batch_size = 16
    seconds: dict[bool, list[float]] = {True: [], False: []}
    latencies: dict[bool, list[float]] = {True: [], False: []}

    def run(share: bool) -> None:
        predictor.share_batches = share
        with ThreadPoolExecutor(CLIENTS) as pool:
            start = time.perf_counter()
            latencies[share] += pool.map(functools.partial(_timed, predictor.predict), requests)
            seconds[share].append(time.perf_counter() - start)

    benchmark.pedantic(run, setup=lambda: (run(False), ((True,), {}))[1], rounds=1 if DRY else 3)
    for share, name in ((True, "shared"), (False, "alone")):
        benchmark.extra_info |= {
            f"{name}_rows_per_s": len(requests) / statistics.median(seconds[share]),
            f"{name}_p50_ms": 1e3 * statistics.median(latencies[share]),
            f"{name}_p95_ms": 1e3 * float(np.percentile(latencies[share], 95)),
        }


class Contest:
    """A run with prompts of K retrieved behaviours, and three ways to predict with its weights."""

    def __init__(self, k: int, folder: Path) -> None:
        from rellax.ctr.llm import load_model
        from rellax.ctr.predictor import Predictor

        self.folder = folder
        _save_run(k, folder)
        start = time.perf_counter()
        self.predictor = Predictor(folder, device=DEVICE.type)
        self.load_s = time.perf_counter() - start
        task = self.predictor._task
        base = load_model(task.config.model, dtype=task.config.dtype).to(DEVICE)
        self.body = FrozenBody(sharing(base))
        self.published_model = PublishedModel(base, task.model).eval()

    def requests(self, rows: int) -> list[Rows]:
        """Requests of random samples with K behaviours at least, each row of another one."""
        data = self.predictor._task.inputs.dataset
        chosen = np.flatnonzero(data.samples.position >= self.predictor._task.config.k)
        chosen = np.random.default_rng(0).permutation(chosen)[: max(rows * max(ROUNDS.values()), 256)]
        users, items = (data.users["user_id"], data.items["item_id"])
        times = data.behaviour_times[data.offsets[data.samples.user[chosen]] + data.samples.position[chosen]]
        asked = [
            {"user_id": users[int(user)].as_py(), "item_id": items[int(item)].as_py(), "time": int(moment)}
            for user, item, moment in zip(
                data.samples.user[chosen], data.samples.item[chosen], times, strict=True
            )
        ]
        return [asked[start : start + rows] for start in range(0, len(asked) - rows + 1, rows)]

    def prompts(self, rows: Rows) -> tuple[list[Example], Collator]:
        """What a request is for the model."""
        predictor = self.predictor
        prompts, collator, _ = predictor._prompts([predictor._requests.read(row) for row in rows])
        return [prompt for prompt in prompts if isinstance(prompt, Example)], collator

    def published(self, prompts: tuple[list[Example], Collator]) -> np.ndarray:
        examples, collator = prompts
        batch = on_device(replace(collator, packed=False).prompts(examples), DEVICE)
        found = self.published_model.probabilities(**batch, answer_ids=collator.answer_ids)
        return np.asarray(found.cpu())

    def floor(self, prompts: tuple[list[Example], Collator]) -> float:
        examples, collator = prompts
        batch = on_device(replace(collator, packed=True).prompts(examples), DEVICE)
        names = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
        return float(self.body.forward(*(batch[name] for name in names))[0, 0, 0])


def _timed(function: Callable[[Any], object], argument: Any) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def _save_run(k: int, folder: Path) -> None:
    """A finished run of random adapters, and random embeddings to retrieve by."""
    from rellax._files import write_json
    from rellax.ctr.crm import load_crm
    from rellax.ctr.dataset import Dataset
    from rellax.ctr.retrieval import retrieve
    from rellax.ctr.task import Inputs, Task, input_hashes
    from rellax.subr import save_embeddings

    config = replace(_config(k, folder), prompts="retrieved", retrieved=str(folder / "retrieved"))
    dataset = Dataset.load(config.data)
    assert config.crm is not None, "it is of a joint run"
    outputs = load_crm(config.crm, dataset)
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(dataset.items.num_rows, DIM), dim=1)
    save_embeddings(folder / "embeddings", vectors, dataset.items["item_id"].to_pylist(), "random")
    nearest = {"data": config.data, "embeddings": str(folder / "embeddings"), "k": k}
    retrieve(nearest, folder / "retrieved", device="cpu", progress=False)
    inputs = Inputs(dataset, None, outputs.item_embeddings, outputs.instance_embeddings)
    task = Task(config, inputs)
    for projection in task.model.rellax.projections.values():
        torch.nn.init.normal_(projection.lora_b, std=0.02)  # as if it had been trained
    save_adapter(task.model, folder / "adapter")
    write_json(folder / "config.json", config.to_json() | {"inputs": input_hashes(config)})
    write_json(folder / "metrics.json", {})


def _config(k: int, folder: Path) -> TrainConfig:
    """SmolLM2-135M on MovieLens-100K; in a dry run the tests' own model and data."""
    if not DRY:
        return _prepared(k)
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from workspace import GATED, make_workspace

    return make_workspace(folder / "workspace").config(stage="joint", k=k, **GATED)
