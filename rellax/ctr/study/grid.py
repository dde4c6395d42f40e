"""The study: methods x K x shots x seeds beside classical models, all on the same test samples, resumable."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from rellax._files import atomic_folder, read_json, write_json
from rellax.ctr import runs
from rellax.ctr.config import CRM_MODELS, StudyConfig, TrainConfig
from rellax.ctr.dataset import Dataset
from rellax.ctr.evaluate import predict_probabilities
from rellax.ctr.lab import Lab, Step, duration, run_steps
from rellax.ctr.llm import load_tokenizer, resolve_device
from rellax.ctr.methods import METHODS, is_language_model, with_starts
from rellax.ctr.prompts import PromptBuilder, recent
from rellax.ctr.study.report import write
from rellax.ctr.study.results import Finished, Scored
from rellax.ctr.task import Task, load_inputs
from rellax.errors import InputError

logger = logging.getLogger(__name__)

_TEST_SEED = 0  # whatever the seeds of the grid: all runs are scored on the same samples
# Axes, what can grow, and what only rounds otherwise: none of them makes it another study.
_FREE = ("methods", "crms", "k", "shots", "seeds", "test_samples", "micro_batch_size", "eval_batch_size")
_RETRIEVED = 30  # at least, so that a larger K can be added later
# What is assumed before anything has been run: training a prompt takes three times its forward pass, ...
_TRAIN_COST = 3.0
_RUN_SECONDS = 10.0  # ... each run this long for loading and writing,
_CRM_SECONDS = (3.0, 4e-4)  # and a classical model this long, and more for each sample it is trained on.
_TIMED_PROMPTS = 48


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: a name in `METHODS`, or of a classical model.
        k: behaviours in a prompt; None for a classical model.
        shots: training samples; 0 for the untrained model, None where a classical model is trained on all.
        seed: None for the untrained model, which has nothing random.
        hold_out: training samples that a classical model for gates leaves out.
    """

    method: str
    k: int | None = None
    shots: int | None = 0
    seed: int | None = None
    hold_out: int | None = None

    @property
    def name(self) -> str:
        """Its folder: "rella-k10-n256-s0", "din-all-s0", "zero-shot-recent-k10"."""
        parts = [self.method.lower()]
        if self.k is not None:
            parts.append(f"k{self.k}")
        if self.hold_out is not None:
            parts.append(f"without{self.hold_out}")
        elif self.shots != 0:
            parts.append("all" if self.shots is None else f"n{self.shots}")
        return "-".join(parts if self.seed is None else [*parts, f"s{self.seed}"])

    @property
    def title(self) -> str:
        parts = [METHODS[self.method].title if self.method in METHODS else self.method]
        if self.k is not None:
            parts.append(f"K = {self.k}")
        if self.hold_out is not None:
            parts.append(f"all but {self.hold_out:,} samples")
        elif self.shots != 0:
            parts.append("all samples" if self.shots is None else f"{self.shots:,} shots")
        return ", ".join(parts if self.seed is None else [*parts, f"seed {self.seed}"])

    @property
    def result(self) -> str:
        """Where, in the study's folder, its predictions are once it is finished."""
        return f"{self.name}/{'test/' if is_language_model(self.method) else ''}predictions.parquet"


def reproduce(
    config: StudyConfig,
    out: str | Path,
    *,
    device: str = "auto",
    progress: bool = True,
    only: str | None = None,
    jobs: int = 1,
) -> str:
    """Run the grid, what is finished in `out` apart, and return the report as Markdown.

    `out` gets a folder for each run, and report.md, results.csv and figures of all finished runs of the grid.
    A larger grid of the same settings goes on in the same folder; so does one with more test samples, on
    which finished runs are scored as well.

    Args:
        only: "plan" reads the data, measures this machine and returns how long the grid would take; "report"
            writes the report of what is finished, with the settings that the study was begun with; neither
            runs any of the grid, nor makes `out` the folder of a study.
        jobs: runs at a time, each in a process of its own with its share of the CPU threads.

    Raises:
        InputError: no such method or classical model, `jobs` is not positive, no network at the first run,
            `out` holds a study of other settings, the data have fewer training samples than a run is to be
            trained on, or nothing is finished to report on.
    """
    if jobs < 1:
        raise InputError(f"jobs: expected a positive number, got {jobs}")
    out = Path(out)
    if only == "report":
        return _Study(_recorded(config, out), out, device, progress, jobs).report()
    begun = runs.is_claimed(out, _settings(config))
    with contextlib.nullcontext(out) if begun else tempfile.TemporaryDirectory() as folder:
        study = _Study(config, Path(folder), device, progress, jobs)
        study.prepare()
        plan = study.plan()
        if only == "plan":
            return plan
        logger.info("%s", plan)
        if not begun:
            study.begin(out)
    study.run()
    return study.report()


def cells(config: StudyConfig) -> list[Cell]:
    """All runs of the grid, each after those that it builds on; small ones and the first seed come first."""
    unknown = [name for name in (*config.crms, config.crm) if name not in CRM_MODELS]
    if unknown:
        raise InputError(f"crms: expected some of {', '.join(CRM_MODELS)}, got {unknown[0]!r}")
    methods = with_starts(config.methods)
    found = [Cell(method, k) for method in methods for k in config.k if METHODS[method].stage is None]
    for seed in config.seeds:
        found += [Cell(name, None, None, seed) for name in config.crms]
        for shots in sorted(config.shots):
            found += [Cell(name, None, shots, seed) for name in config.crms]
            for k in config.k:
                for method in methods:
                    if METHODS[method].reads_crm:
                        found.append(gates_crm(config, method, shots, seed))
                    if METHODS[method].stage is not None:
                        found.append(Cell(method, k, shots, seed))
    return list(dict.fromkeys(found))


def gates_crm(config: StudyConfig, method: str, shots: int, seed: int) -> Cell:
    """The classical model that a method's gates and soft prompts read."""
    samples = METHODS[method].crm_samples or config.crm_samples
    if samples == "held-out":
        return Cell(config.crm, None, None, seed, hold_out=shots)
    return Cell(config.crm, None, shots if samples == "shots" else None, seed)


def starts(config: StudyConfig, cell: Cell) -> list[Cell]:
    """What a run builds on: the LoRA that it continues in stage 2, and the classical model that it reads."""
    if cell.method not in METHODS or cell.shots is None or cell.seed is None:
        return []
    method, found = METHODS[cell.method], []
    if method.start is not None:
        found.append(Cell(method.start, cell.k, cell.shots, cell.seed))
    if method.reads_crm:
        found.append(gates_crm(config, cell.method, cell.shots, cell.seed))
    return found


def _run(config: StudyConfig, lab: Lab, cell: Cell) -> None:
    if cell.method not in METHODS:
        lab.crm(cell.name, cell.method, shots=cell.shots, hold_out=cell.hold_out, seed=cell.seed)
        return
    assert cell.k is not None, "a prompt has behaviours"
    if METHODS[cell.method].stage is None:
        score = lab.zero_shot if METHODS[cell.method].is_model else lab.share
        score(cell.name, cell.method, cell.k)
        return
    assert cell.shots is not None, "`cells` gives shots to what is trained, "
    assert cell.seed is not None, "and a seed"
    before = starts(config, cell)
    start = next((first.name for first in before if first.method in METHODS), "")
    crm = next((first.name for first in before if first.method not in METHODS), "")
    lab.train(cell.name, cell.method, k=cell.k, shots=cell.shots, seed=cell.seed, start=start, crm=crm)


def _settings(config: StudyConfig) -> dict[str, Any]:
    """What the config.json of a study holds: all that its runs share."""
    return {name: value for name, value in asdict(config).items() if name not in _FREE}


def _recorded(config: StudyConfig, out: Path) -> StudyConfig:
    """`config` with the settings of the study in `out`."""
    path = out / "config.json"
    if not path.exists():
        raise InputError(f"{out}: expected a study, found none; `rellax reproduce` begins one")
    found = read_json(path)
    if not isinstance(found, dict) or not found.keys() <= _settings(config).keys():
        raise InputError(f"{path}: expected the settings of a study, found another configuration")
    return replace(config, **found)


class _Study:
    def __init__(self, config: StudyConfig, out: Path, device: str, progress: bool, jobs: int) -> None:
        self.config, self.out, self.device, self.jobs = config, out, device, jobs
        self.progress, self.cells = progress, cells(config)
        self.lab = self._lab(out)

    def _lab(self, out: Path) -> Lab:
        return Lab(
            self.config,
            out,
            k=max(_RETRIEVED, *self.config.k),
            shots=max((cell.shots or 0 for cell in self.cells), default=0) or None,
            test_seed=_TEST_SEED,
            device=self.device,
            progress=self.progress,
            data=self.config.data,
        )

    def begin(self, out: Path) -> None:
        """Make `out` this study's folder, with the data of the one in which `prepare` found nothing wrong."""
        write_json(out / "config.json", _settings(self.config))
        write_json(out / "environment.json", runs.environment())
        if self.config.data is None:
            with atomic_folder(out / "data") as part:
                shutil.copytree(self.lab.data, part, dirs_exist_ok=True)
        model, self.out, self.lab = self.lab.model, out, self._lab(out)
        self.lab.model = model

    def prepare(self) -> None:
        self.lab.prepare()
        self.dataset = Dataset.load(self.lab.data)
        self._check_held_out()
        self.tokens = {k: self._tokens(k) for k in self.config.k}
        self.speed = self._speed()

    def _check_held_out(self) -> None:
        train = len(self.dataset.indices("train"))
        most = max((cell.hold_out or 0 for cell in self.cells), default=0)
        if most >= train:
            raise InputError(
                f"shots: expected fewer than all {train} training samples, as a classical model is trained "
                f"on the others, got {most}"
            )

    def retrieve(self) -> None:
        """What all retrieved prompts are made from."""
        self.lab.embed(self._similar_by())
        self.lab.retrieve()

    def _similar_by(self) -> str | None:
        """The folder of the classical model whose item embeddings stand beside the text's."""
        if self.config.similarity == "text":
            return None
        cell = Cell(self.config.crm, None, None, 0)
        _run(self.config, self.lab, cell)
        return cell.name

    def plan(self) -> str:
        """How much of the grid is done, and how long the rest will take, by method."""
        left = [cell for cell in self.cells if not self._is_finished(cell)]
        rate = self._correction() / self.jobs
        seconds = sum(map(self._seconds_left, left)) * rate
        lines = ["| runs | finished | of | time left |", "|---|---|---|---|"]
        for method in dict.fromkeys(cell.method for cell in self.cells):
            of = [cell for cell in self.cells if cell.method == method]
            todo = [cell for cell in of if not self._is_finished(cell)]
            time = duration(sum(map(self._seconds_left, todo)) * rate) if todo else "-"
            title = METHODS[method].title if method in METHODS else method
            lines.append(f"| {title} | {len(of) - len(todo)} | {len(of)} | {time} |")
        done = len(self.cells) - len(left)
        rest = f"about {duration(seconds)} left on this machine" if left else "nothing left to run"
        return "\n".join([*lines, "", f"{done} of {len(self.cells)} runs are finished, {rest}."])

    def run(self) -> None:
        self.retrieve()
        left = [cell for cell in self.cells if not self._is_finished(cell)]
        correction = self._correction()
        lab = copy(self.lab)
        lab.progress &= self.jobs == 1  # bars of several processes would write over one another
        steps = [
            Step(
                cell.title,
                self._seconds_left(cell) * correction,
                partial(_run, self.config, lab, cell),
                [start.title for start in starts(self.config, cell)],
            )
            for cell in left
        ]
        done = len(self.cells) - len(left)
        run_steps(steps, self.out / "steps.json", done=done, seconds_per_cost=1.0, jobs=self.jobs)

    def report(self) -> str:
        dataset = Dataset.load(self.lab.data)
        chosen = self.lab.test_samples(dataset)
        samples = dataset.samples
        test = Scored(chosen, samples.label[chosen], samples.user[chosen], samples.position[chosen])
        finished = list(self._finished(test))
        if not finished:
            raise InputError(f"{self.out}: expected a finished run of the grid, found none")
        reported = sum(cell.hold_out is None for cell in self.cells)
        return write(self.out, self.config, dataset, test, finished, reported)

    def _finished(self, test: Scored) -> Iterator[Finished]:
        for cell in self.cells:
            if self._is_finished(cell) and cell.hold_out is None:
                yield Finished.read(self.out, cell, test)

    def _is_finished(self, cell: Cell) -> bool:
        if not is_language_model(cell.method):
            return (self.out / cell.result).exists()
        return self._scored(cell) >= (self.config.test_samples or math.inf)

    def _scored(self, cell: Cell) -> float:
        """On how many test samples a language model has been scored: infinity is on all."""
        path = self.out / cell.name / "test" / "config.json"
        return (read_json(path)["samples"] or math.inf) if path.exists() else 0

    def _seconds_left(self, cell: Cell) -> float:
        """What is left of a run is thought to take so long."""
        trained = is_language_model(cell.method) and (self.out / cell.name / "metrics.json").exists()
        return self._seconds(cell, trained=trained, scored=self._scored(cell))

    def _seconds(self, cell: Cell, *, trained: bool = False, scored: float = 0) -> float:
        """What a run is thought to take; a language model may have been trained and scored in part."""
        config, train = self.config, len(self.dataset.indices("train"))
        if cell.method not in METHODS:
            shots = train - (cell.hold_out or 0) if cell.shots is None else cell.shots
            return _CRM_SECONDS[0] + _CRM_SECONDS[1] * shots
        assert cell.k is not None, "a prompt has behaviours"
        method = METHODS[cell.method]
        if not method.is_model:
            return 1.0
        prompts = max(0.0, self._count("test", config.test_samples) - scored)
        if method.stage is not None and not trained:
            epochs = config.epochs if method.stage == "1" else config.epochs2
            seen = (cell.shots or 0) * (2 if method.prompts == "mixture" else 1)
            validation = self._count("valid", config.validation_samples)
            prompts += epochs * (_TRAIN_COST * seen + validation)
        return _RUN_SECONDS + prompts * self.tokens[cell.k] / self.speed

    def _count(self, split: str, n: int | None) -> int:
        of = len(self.dataset.indices(split))
        return of if n is None else min(n, of)

    def _correction(self) -> float:
        """How much longer the finished runs took than was thought."""
        path = self.out / "steps.json"
        times = read_json(path) if path.exists() else {}
        known = [cell for cell in self.cells if cell.title in times and self._is_finished(cell)]
        if not known:
            return 1.0
        took = sum(times[cell.title]["seconds"] for cell in known)
        return float(took / sum(map(self._seconds, known)))

    def _tokens(self, k: int) -> float:
        """Mean tokens of a prompt."""
        chosen = self._some("test", 500)
        prompts = PromptBuilder(
            load_tokenizer(self._model()), self.dataset, k=k, max_tokens=TrainConfig.max_tokens
        )
        return float(prompts.lengths(chosen, recent(self.dataset.samples.position[chosen], k)).mean())

    def _speed(self) -> float:
        """Tokens scored in a second by this machine, measured once for each number of threads and device."""
        path, where = self.out / "speed.json", resolve_device(self.device)
        key = f"{where.type}, {torch.get_num_threads()} threads"
        known: dict[str, float] = read_json(path) if path.exists() else {}
        if key not in known:
            k = sorted(self.config.k)[len(self.config.k) // 2]
            config = TrainConfig(data=str(self.lab.data), model=self._model(), prompts="recent", k=k)
            task = Task(config, load_inputs(config), device=where)
            examples = task.examples(self._some("test", _TIMED_PROMPTS), "recent")
            tokens = float(examples.lengths(np.arange(len(examples))).sum())
            size = self.config.eval_batch_size
            score = partial(predict_probabilities, task.model, task.collator, batch_size=size)
            score(examples[:4])  # the first one is slower
            started = monotonic()
            score(examples)
            known[key] = tokens / (monotonic() - started)
            write_json(path, known)
        return known[key]

    def _some(self, split: str, n: int) -> np.ndarray:
        return self.dataset.choose(split, min(n, len(self.dataset.indices(split))), _TEST_SEED)

    def _model(self) -> str:
        assert self.lab.model is not None, "`prepare` sets it"
        return self.lab.model
