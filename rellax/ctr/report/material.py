"""What the page is made of: run folders, their predictions on shared samples, and the data behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rellax._files import read_json, sha256_file
from rellax.ctr import calibration, metrics, predictions
from rellax.ctr.calibration import Calibration
from rellax.ctr.crm import WEIGHTS
from rellax.ctr.dataset import Dataset
from rellax.ctr.predictions import Predictions
from rellax.ctr.runs import entries
from rellax.errors import InputError
from rellax.patch.adapter import TENSOR_FILE

_DRAWS = 20_000_000  # resampled values of a bootstrap, at most, beyond its 100 resamplings


@dataclass(frozen=True)
class Scores:
    """Predictions (n,) of a run, by rising sample; `metrics` are `metrics.evaluate` of them."""

    sample: np.ndarray
    label: np.ndarray
    probability: np.ndarray
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        kind: "train", "zero-shot" or "crm".
        config: as it was asked for, of `TrainConfig` or `CRMConfig`.
        what: that in a few words.
        scores: None where the split was not scored.
        result: metrics.json of the training; empty where there is none.
        log: entries of the training's log.
        calibration: None where there is none.
    """

    name: str
    folder: Path
    kind: str
    config: dict[str, Any]
    what: str
    scores: Scores | None
    result: dict[str, Any]
    log: list[dict[str, Any]]
    calibration: Calibration | None

    @property
    def is_gated(self) -> bool:
        return self.config.get("interaction", "none") != "none"


@dataclass(frozen=True)
class Material:
    """All runs of a page.

    Attributes:
        shared: whether all scored runs are cut to the samples that every one of them scored.
        baseline: the run that the others are compared with; None where that one was not scored.
        draws: resamplings of each bootstrap.
    """

    work: Path
    split: str
    seed: int
    dataset: Dataset
    runs: list[Run]
    shared: bool
    baseline: Run | None
    draws: int

    @property
    def scored(self) -> list[tuple[Run, Scores]]:
        return [(run, run.scores) for run in self.runs if run.scores is not None]

    @property
    def unscored(self) -> list[Run]:
        return [run for run in self.runs if run.scores is None]

    def index(self, run: Run) -> int:
        """Its place on the page, which gives it its colour."""
        return next(i for i, other in enumerate(self.runs) if other.name == run.name)

    def users(self, scores: Scores) -> np.ndarray:
        """Whose each sample is."""
        return self.dataset.samples.user[scores.sample]

    def lengths(self, scores: Scores) -> np.ndarray:
        """How many behaviours come before each sample."""
        return self.dataset.samples.position[scores.sample]

    def calibrated(self, run: Run, scores: Scores) -> np.ndarray | None:
        """Its calibrated probabilities (n,); None without a calibration, or the CRM that belongs to it."""
        if run.calibration is None:
            return None
        crm = run.calibration.crm
        if crm is None:
            return run.calibration.apply(scores.probability)
        folder = self.folder(crm, Path(crm).name)
        known = _predictions(folder, self.dataset, self.split) if folder else None
        if known is None:
            return None
        beside = known.probability[np.searchsorted(known.sample, scores.sample)]
        return run.calibration.apply(scores.probability, beside)

    def folder(self, recorded: str | None, name: str) -> Path | None:
        """A folder as a run recorded it, or where it is after the work folder was moved."""
        return _folder(self.work, recorded, name)


def _folder(work: Path, recorded: str | None, name: str) -> Path | None:
    candidates = [work / (name if recorded is None else Path(recorded).name)]
    if recorded is not None:
        candidates.insert(0, Path(recorded))
    return next((path for path in candidates if path.is_dir()), None)


def gather(work: Path, names: Sequence[str], *, split: str, baseline: str | None, seed: int) -> Material:
    """Read runs and compute their metrics.

    Raises:
        InputError: a folder holds no run, a run twice, an unknown baseline, or predictions of other data.
    """
    if not names:
        raise InputError("runs: expected at least one run folder, got none")
    if len(set(names)) < len(names):
        raise InputError(f"runs: expected each once, got {', '.join(names)}")
    if baseline is not None and baseline not in names:
        raise InputError(f"baseline: expected one of the runs {', '.join(names)}, got {baseline!r}")
    dataset = Dataset.load(work / "data")
    runs = [_read(work, name, split, dataset) for name in names]
    scored = [run.scores.sample for run in runs if run.scores is not None]
    common = _common(scored, dataset)
    if common is not None:
        runs = [_cut(run, common) for run in runs]
    largest = max((len(samples) for samples in ([common] if common is not None else scored)), default=1)
    draws = int(min(1000, max(100, _DRAWS // largest)))
    runs = [_measured(run, dataset, draws, seed) for run in runs]
    first = next(run for run in runs if run.name == (baseline or names[0]))
    return Material(
        work=work,
        split=split,
        seed=seed,
        dataset=dataset,
        runs=runs,
        shared=common is not None,
        baseline=first if first.scores is not None else None,
        draws=draws,
    )


def _read(work: Path, name: str, split: str, dataset: Dataset) -> Run:
    folder = work / name
    path, part = folder / "config.json", folder / split
    if not path.exists():
        found = next(iter(sorted(folder.glob("*/config.json"))), None)
        request = read_json(found) if found is not None else {}
        if "run" not in request:
            raise InputError(
                f"{folder}: expected a run of `rellax train`, `rellax crm` or `rellax evaluate --zero-shot`, "
                "found none"
            )
        config, kind = request["run"], "zero-shot"
    else:
        config = read_json(path)
        kind = "train" if "prompts" in config else "crm"
    if kind == "crm":
        scores = _predictions(folder, dataset, split)
        config = {"data": str(dataset.folder)} | config
    elif kind == "train" and not _is_of_adapter(_json(part / "config.json"), folder):
        scores = None  # of the run before it was done anew, or of the untrained model
    else:
        scores = _predictions(part, dataset, split)
    return Run(
        name=name,
        folder=folder,
        kind=kind,
        config=config,
        what=_what(kind, config),
        scores=scores,
        result=_json(folder / "metrics.json"),
        log=list(entries(folder / "log.jsonl")),
        calibration=_calibration(folder, work),
    )


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.exists() else {}


def _calibration(folder: Path, work: Path) -> Calibration | None:
    """The calibration of a run; none where it is of an adapter or a CRM that is no longer there."""
    path = folder / calibration.FILE
    found = _json(path)
    if not found or ("adapter" in found and not _is_of_adapter(found, folder)):
        return None
    read = calibration.calibration_of(found, path)
    if read.crm is not None:
        weights = (_folder(work, read.crm, Path(read.crm).name) or folder) / WEIGHTS
        if not weights.is_file() or sha256_file(weights) != found.get("crm_sha256"):
            return None
    return read


def _is_of_adapter(found: dict[str, Any], folder: Path) -> bool:
    """Whether a record names the adapter of the run in `folder`."""
    adapter = folder / "adapter" / TENSOR_FILE
    return adapter.exists() and found.get("adapter") == sha256_file(adapter)


def _predictions(folder: Path, dataset: Dataset, split: str) -> Scores | None:
    """The predictions of the split in a folder; None where there are none."""
    if not (folder / predictions.FILE).exists():
        return None
    found = Predictions.read(folder)
    sample, label, probability = found.samples, found.labels, found.probabilities
    known = sample[(sample >= 0) & (sample < len(dataset.samples))]
    if len(known) < len(sample) or (dataset.samples.label[sample] != label).any():
        raise InputError(
            f"{found.path}: expected predictions of the samples of {dataset.folder}, found others"
        )
    rows = np.flatnonzero(np.isin(sample, dataset.indices(split)))
    rows = rows[np.argsort(sample[rows], kind="stable")]
    if not len(rows):
        return None
    return Scores(sample[rows], label[rows].astype(np.int64), probability[rows].astype(np.float64), {})


def _common(scored: Sequence[np.ndarray], dataset: Dataset) -> np.ndarray | None:
    """Samples that all runs scored, unless these are few of what the shortest has, or of one label."""
    if not scored:
        return None
    common = scored[0]
    for samples in scored[1:]:
        common = np.intersect1d(common, samples, assume_unique=True)
    enough = 2 * len(common) >= min(len(samples) for samples in scored)
    both = len(np.unique(dataset.samples.label[common])) == 2
    return common if enough and (both or len(scored) == 1) else None


def _cut(run: Run, common: np.ndarray) -> Run:
    if run.scores is None:
        return run
    rows = np.searchsorted(run.scores.sample, common)
    old = run.scores
    return replace(run, scores=Scores(common, old.label[rows], old.probability[rows], {}))


def _measured(run: Run, dataset: Dataset, draws: int, seed: int) -> Run:
    if run.scores is None:
        return run
    users = dataset.samples.user[run.scores.sample]
    values = metrics.evaluate(run.scores.label, run.scores.probability, users, bootstrap=draws, seed=seed)
    return replace(run, scores=replace(run.scores, metrics=values))


def _what(kind: str, config: dict[str, Any]) -> str:
    shots = "all training samples" if config.get("shots") is None else f"{config['shots']:,} shots"
    if kind == "crm":
        return f"{config.get('model', 'classical model')}, {shots}"
    prompts = config["prompts"]
    shown = f"{config['k']} {'retrieved' if prompts == 'mixture' else prompts} behaviours"
    if config.get("recent_share"):
        shown += f", {config['recent_share']:.0%} of them the most recent"
    model = Path(config["model"]).name
    if kind == "zero-shot":
        return f"{model} untrained, {shown}"
    parts = {"none": [], "diagonal": ["diagonal gates"], "full": ["CFLoRA"]}[config["interaction"]]
    parts = parts + (["SPA"] if config["soft_prompt"] else [])
    trained = " + ".join(parts) or "LoRA"
    start = f" on {Path(config['start']).name}" if config.get("start") else ""
    boosted = f", boosted from {Path(config['crm']).name}" if config.get("crm_logit") else ""
    mixture = ", mixture" if prompts == "mixture" else ""
    return f"{trained}{start}{boosted}, {shown}{mixture}, {shots}"
