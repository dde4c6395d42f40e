"""The steps of a comparison: data, embeddings, classical models and runs in one folder, each made once."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from rellax._files import read_json, write_json
from rellax.ctr import assets, runs
from rellax.ctr.config import Comparison, CRMConfig, TrainConfig, recent_behaviours
from rellax.ctr.crm import make_crm
from rellax.ctr.dataset import Dataset
from rellax.ctr.embedding import embed
from rellax.ctr.evaluate import evaluate, evaluate_share, evaluate_zero_shot
from rellax.ctr.methods import METHODS
from rellax.ctr.prepare import prepare
from rellax.ctr.retrieval import retrieve
from rellax.ctr.sources import read_ml_100k
from rellax.ctr.stopping import Terminated, stoppable
from rellax.ctr.train import train
from rellax.errors import InputError, one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A part of a comparison.

    Attributes:
        cost: what it is thought to take, in any unit that all steps share.
        run: pickled where steps run side by side.
        after: titles of the steps that it builds on.
    """

    title: str
    cost: float
    run: Callable[[], Any]
    after: Sequence[str] = ()


def run_steps(
    steps: Sequence[Step],
    record: Path,
    *,
    done: int = 0,
    seconds_per_cost: float | None = None,
    jobs: int = 1,
) -> None:
    """Run `steps`, each after those that it builds on, and say what is left.

    Args:
        record: steps.json, which gets seconds and peak memory of each step at its first run.
        done: as many steps of the comparison were finished before.
        seconds_per_cost: what a unit of cost takes, until some steps have told.
        jobs: so many at a time, each in a process with its share of the CPU threads; 1 is this process.

    Raises:
        InputError: several at a time need more of the GPU's memory than there is.
    """
    times = read_json(record) if record.exists() else {}
    left, spent, seconds = sum(step.cost for step in steps), 0.0, 0.0
    numbers = itertools.count(done + 1)

    def begins(step: Step) -> None:
        rate = seconds / spent if seconds > 5 else seconds_per_cost
        rest = "" if rate is None else f", about {duration(left * rate / jobs)} left"
        logger.info("[%d/%d] %s%s", next(numbers), done + len(steps), step.title, rest)

    try:
        for step, took, peak in _finished(steps, jobs, begins):
            left -= step.cost
            if step.title not in times:
                spent, seconds = spent + step.cost, seconds + took
                times[step.title] = {"seconds": round(took, 1), "peak_gib": round(peak, 2)}
                write_json(record, times)
    except torch.OutOfMemoryError as error:
        if jobs == 1:
            raise
        raise InputError(
            f"jobs: {jobs} at a time need more of the GPU's memory than there is; with fewer the same "
            f"command goes on from here ({one_line(error)})"
        ) from None


def _finished(
    steps: Sequence[Step], jobs: int, begins: Callable[[Step], None]
) -> Iterator[tuple[Step, float, float]]:
    """Each step as it ends, its seconds, and the peak memory of its process in GiB.

    Once one has failed none begins any more, and its error comes when those beside it have ended.
    """
    if jobs == 1:
        for step in steps:
            begins(step)
            yield step, *_timed(step.run)
        return
    waiting, running = list(steps), dict[Future[tuple[float, float]], Step]()
    failure: Exception | None = None
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        try:
            while waiting or running:
                unfinished = {step.title for step in (*waiting, *running.values())}
                ready = [step for step in waiting if unfinished.isdisjoint(step.after)]
                for step in ready[: jobs - len(running)]:
                    waiting.remove(step)
                    begins(step)
                    running[pool.submit(_timed, step.run)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    step = running.pop(future)
                    try:
                        took, peak = future.result()
                    except Exception as error:
                        reason = one_line(error) or repr(error)
                        logger.error("%s failed (%s); what has begun is finished", step.title, reason)
                        failure, waiting = failure or error, []
                    else:
                        yield step, took, peak
        except Terminated:  # Ctrl-C comes to all processes, this one would wait for the others' steps
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    if failure is not None:
        raise failure


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    started = monotonic()
    try:
        with stoppable():
            run()
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what this process keeps for itself, those beside it cannot have
    return monotonic() - started, runs.peak_memory_gib()


def duration(seconds: float) -> str:
    """As people say it: "3 min", "2 h 10 min", "4 days 3 h"."""
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


class Lab:
    """Makes the folders of a comparison in `out`; what is there already is only checked.

    Args:
        config: what all runs share.
        k: most behaviours that any of the prompts has.
        shots: most samples that any of the runs is trained on, those on all of them apart; None where no
            run has shots.
        test_seed: of the test samples, on which every run is scored.
        data: folder of `rellax prepare`; None is `out`/data, made from MovieLens-100K.
    """

    def __init__(
        self,
        config: Comparison,
        out: Path,
        *,
        k: int,
        shots: int | None,
        test_seed: int,
        device: str,
        progress: bool,
        data: str | None = None,
    ) -> None:
        self.config, self.out, self.k, self.shots, self.test_seed = config, out, k, shots, test_seed
        self.device, self.progress = device, progress
        self.data = Path(data) if data is not None else out / "data"
        self.model = config.model

    def prepare(self) -> None:
        """Fetch the model, prepare the data, and check that these have so many samples."""
        if self.model is None:
            self.model = str(assets.smollm2_135m())
        if self.data == self.out / "data" and not (self.data / "dataset.json").exists():
            raw = assets.movielens_100k() if self.config.raw is None else self.config.raw
            prepare(read_ml_100k(raw), self.data)
        dataset = Dataset.load(self.data)
        dataset.choose("train", self.shots, 0, name="shots")
        self.test_samples(dataset)

    def test_samples(self, dataset: Dataset) -> np.ndarray:
        """The samples that every run is scored on; all of a test split that has fewer than asked for."""
        n = self.config.test_samples
        return dataset.choose("test", n, self.test_seed, name="test_samples", at_most=True)

    def embed(self, crm: str | None = None) -> None:
        """Embed the items' texts; `crm` names the folder of a classical model to put beside."""
        config = {"data": str(self.data), "model": self.model, "dim": 512}
        config |= {"crm": self._path(crm)} if crm is not None else {}
        embed(config, self.out / "embeddings", device=self.device, progress=self.progress)

    def retrieve(self) -> None:
        config = {"data": str(self.data), "embeddings": self._path("embeddings"), "k": self.k}
        retrieve(config, self.out / "retrieved", device=self.device, progress=self.progress)

    def crm(self, name: str, model: str, **options: Any) -> None:
        """Train a classical model in the folder `name`; `options` are fields of `CRMConfig`."""
        config = CRMConfig(model=model, epochs=self.config.crm_epochs, **options)
        make_crm(self.data, self.out / name, config, device=self.device)

    def share(self, name: str, method: str, k: int) -> None:
        """Score all samples by the share of liked behaviours, in the folder `name`."""
        retrieved = self._path("retrieved") if METHODS[method].prompts == "retrieved" else None
        count = recent_behaviours(self.config.recent_share, k) if retrieved is not None else 0
        dataset = Dataset.load(self.data)
        evaluate_share(dataset, self.out / name, k=k, retrieved=retrieved, recent_behaviours=count)

    def zero_shot(self, name: str, method: str, k: int) -> None:
        """Score the untrained model on the test samples; the folder `name`/test gets the result."""
        config = self._train_config(k=k, prompts=METHODS[method].prompts)
        evaluate_zero_shot(config, self.out / name / "test", **self._scoring())

    def train(
        self, name: str, method: str, *, k: int, shots: int, seed: int, start: str = "", crm: str = ""
    ) -> None:
        """Train in the folder `name` and score it as `zero_shot` does.

        Args:
            start: folder of the run that a method of stage 2 continues.
            crm: folder of the classical model that a method reads.
        """
        what, config = METHODS[method], self.config
        options: dict[str, Any] = {"epochs": config.epochs, "lr": config.lr}
        if what.stage == "2":
            options = {"epochs": config.epochs2, "lr": config.lr2, "stage": "2", "start": self._path(start)}
        if what.reads_crm:
            options["crm"] = self._path(crm)
        if what.options.get("soft_prompt"):
            options["soft_prompt_lr"] = config.soft_prompt_lr
        options |= {"k": k, "shots": shots, "seed": seed, "prompts": what.prompts, **what.options}
        train(self._train_config(**options), self.out / name, device=self.device, progress=self.progress)
        evaluate(self.out / name, **self._scoring())

    def _train_config(self, **options: Any) -> TrainConfig:
        assert self.model is not None, "the first step sets it"
        if options["prompts"] != "recent":
            options["recent_share"] = self.config.recent_share
        return TrainConfig(
            data=str(self.data),
            model=self.model,
            retrieved=self._path("retrieved"),
            validation_samples=self.config.validation_samples,
            batch_size=self.config.batch_size,
            micro_batch_size=self.config.micro_batch_size,
            eval_batch_size=self.config.eval_batch_size,
            **options,
        )

    def _scoring(self) -> dict[str, Any]:
        return {
            "samples": self.config.test_samples,
            "seed": self.test_seed,
            "at_most": True,
            "device": self.device,
            "progress": self.progress,
        }

    def _path(self, name: str) -> str:
        return str(self.out / name)
