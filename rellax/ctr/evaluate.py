"""Scoring: probabilities of a patched model, and the metrics of a run on a split."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rellax._files import atomic_folder, read_json, sha256_file, write_json
from rellax.ctr import metrics, runs
from rellax.ctr.batches import Collator, Example, on_device, scoring_batches
from rellax.ctr.calibration import Calibration, calibrated_metrics, read_calibration, write_calibration
from rellax.ctr.config import PATHS, TrainConfig, read_config
from rellax.ctr.dataset import Dataset
from rellax.ctr.llm import resolve_device
from rellax.ctr.predictions import Predictions
from rellax.ctr.prompts import recent, with_recent
from rellax.ctr.retrieval import read_positions
from rellax.ctr.task import Examples, Task, input_hashes, load_inputs
from rellax.errors import InputError
from rellax.patch import answer_logits
from rellax.patch.adapter import TENSOR_FILE

_AT_ONCE = 512  # prompts between two saves of an evaluation: whole batches, a minute or two of a CPU
_PART = ".part"


@torch.inference_mode()
def predict_probabilities(
    model: Any,
    collator: Collator,
    examples: Sequence[Example],
    *,
    batch_size: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
    done: Callable[[int], object] | None = None,
) -> np.ndarray:
    """P(Yes) of each prompt by a patched model, (n,) float64: softmax over its [No, Yes] logits.

    The model runs on the device it is on, in evaluation mode, and is left in that mode. Which prompts share
    a batch, and so how they are padded, changes a probability by rounding alone; None is 16 prompts, on a GPU
    64. Of several processes each runs as many batches of its `share` (process, processes), the same as one
    process would, and has 0 for all others: the sum is whole. `done` is told of each batch how many prompts
    it had.
    """
    model.eval()
    device = next(model.parameters()).device
    soft_prompt = model.rellax.soft_prompt
    if soft_prompt is not None:
        soft_prompt.cache_table()
    probabilities = np.zeros(len(examples))
    size = (64 if device.type == "cuda" else 16) if batch_size is None else batch_size
    batches = scoring_batches([len(example.input_ids) for example in examples], size)
    process, processes = share
    with tqdm(total=len(examples), desc="score", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(batches), processes):
            rows = batches[min(start + process, len(batches) - 1)]
            batch = collator.prompts([examples[row] for row in rows])
            logits = answer_logits(model, **on_device(batch, device))
            if start + process < len(batches):
                probabilities[rows] = logits.double().softmax(dim=-1)[:, 1].cpu().numpy()
            bar.update(len(rows))
            if done is not None:
                done(len(rows))
    return probabilities


def evaluate(
    run: str | Path,
    *,
    split: str = "test",
    samples: int | None = None,
    seed: int = 0,
    at_most: bool = False,
    folder: str | Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a finished training run on a split and return the metrics.

    A stopped evaluation goes on from the last 512 prompts that it scored.

    Args:
        run: folder of `rellax train`.
        samples: random samples of the split, chosen by `seed`; None takes all.
        at_most: take all where the split has fewer.
        folder: gets config.json, environment.json, metrics.json and predictions.parquet (sample, label,
            probability); None is a folder named after the split in `run`. Where it holds this very result
            already, that is only read; where it holds that of fewer samples, only the others are scored.
        batch_size: prompts that are scored at once; None is the run's `eval_batch_size`.

    Returns:
        What `metrics.evaluate` does, and `split`. Predictions and metrics are uncalibrated; where the run has
        been calibrated, `calibrated` has how, and what log loss and ECE that gives, with a CRM which AUC too.

    Raises:
        InputError: the run is not finished, its data have changed since, or `folder` holds another result.
    """
    run = Path(run)
    config = read_config(run)
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"batch_size: expected a positive number or None, got {batch_size!r}")
        config = dataclasses.replace(config, eval_batch_size=batch_size)
    recorded = read_json(run / "config.json")
    known, inputs = recorded["inputs"], input_hashes(config)
    if changed := sorted(name for name in known | inputs if known.get(name) != inputs.get(name)):
        raise InputError(
            f"{run}: expected the files it was trained with, but {', '.join(changed)} changed since; "
            "`rellax predict` answers for newer data, and a run of a new name can be trained on them"
        )
    folder = run / split if folder is None else Path(folder)
    # With the paths as they were: the result of a run that has been moved is the same.
    asked = config.to_json() | {name: recorded.get(name) for name in PATHS}
    result = _evaluate(
        config, asked, run / "adapter", folder, split, samples, seed, at_most, device, progress
    )
    return _with_calibration(result, folder, read_calibration(run), config.data, seed)


def calibrate(run: str | Path, *, crm: str | Path | None = None) -> dict[str, Any]:
    """Fit a run's calibration on the validation predictions of its training.

    Args:
        crm: folder of `rellax crm`, a model that the run is stacked on; None fits a temperature.

    Returns:
        The contents of the run's calibration.json, see `calibration.write_calibration`.

    Raises:
        InputError: the run is not finished, its validation samples have one label, or the CRM is of other
            data or samples.
    """
    run = Path(run)
    read_config(run)
    found = Predictions.read(run)
    if crm is None:
        return write_calibration(run, found.labels, found.probabilities)
    samples, of_crm = "samples.parquet", Path(crm) / "inputs.json"
    known = read_json(run / "config.json")["inputs"].get(samples)
    if of_crm.exists() and read_json(of_crm).get(samples) != known:
        raise InputError(
            f"crm: expected one of the samples that {run} was trained on, found one of others in {crm}, "
            "which may have been trained on those that this is fitted to"
        )
    beside = _of_crm(str(crm), found)
    return write_calibration(run, found.labels, found.probabilities, crm=str(crm), crm_probabilities=beside)


def evaluate_zero_shot(
    config: TrainConfig,
    folder: str | Path,
    *,
    split: str = "test",
    samples: int | None = None,
    seed: int = 0,
    at_most: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Score the language model as it is, with the prompts of `config`; else as `evaluate`."""
    asked = config.to_json()
    return _evaluate(config, asked, None, Path(folder), split, samples, seed, at_most, device, progress)


def evaluate_share(
    dataset: Dataset,
    folder: str | Path,
    *,
    k: int,
    retrieved: str | Path | None = None,
    recent_behaviours: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Score all samples without a model: by how many of K behaviours were liked.

    P(Yes) = (liked + 1) / (rated + 2) of the behaviours that a prompt would show. A model that reads them
    should know more.

    Args:
        folder: gets config.json, environment.json, metrics.json and predictions.parquet (all samples), as
            those of `train_crm`.
        retrieved: folder of `rellax retrieve`; None takes the K most recent behaviours.
        recent_behaviours: how many of the retrieved ones make room for the most recent ones.

    Returns:
        The contents of metrics.json: `metrics.evaluate` for `valid` and `test`.

    Raises:
        InputError: `folder` holds another result.
    """
    request = {
        "data": str(dataset.folder),
        "retrieved": None if retrieved is None else str(retrieved),
        "k": k,
    } | ({"recent_behaviours": recent_behaviours} if recent_behaviours else {})
    if runs.is_claimed(folder, request):
        return read_json(Path(folder) / "metrics.json")
    samples, meta = dataset.samples, dataset.meta
    shown = recent(samples.position, k) if retrieved is None else read_positions(retrieved, dataset, k)
    if recent_behaviours:
        shown = with_recent(shown, samples.position, recent_behaviours)
    rows = dataset.offsets[samples.user][:, None] + np.maximum(shown, 0)
    ratings = dataset.behaviour_ratings[rows]
    rated = (shown >= 0) & (ratings != meta["unrated"])
    liked = rated & (ratings > meta["positive_above"])
    probabilities = (liked.sum(1) + 1) / (rated.sum(1) + 2)
    result = {}
    for split in ("valid", "test"):
        of = dataset.indices(split)
        result[split] = metrics.evaluate(samples.label[of], probabilities[of], samples.user[of], seed=seed)
    _write(Path(folder), Predictions(np.arange(len(samples)), samples.label, probabilities), result, request)
    return result


def _evaluate(
    config: TrainConfig,
    asked: dict[str, Any],
    adapter: Path | None,
    folder: Path,
    split: str,
    samples: int | None,
    seed: int,
    at_most: bool,
    device: str,
    progress: bool,
) -> dict[str, Any]:
    request = {
        "run": asked,
        "adapter": None if adapter is None else sha256_file(adapter / TENSOR_FILE),
        "inputs": input_hashes(config),
        "split": split,
        "samples": samples,
        "seed": seed,
    }
    advice = "remove this folder to score anew"
    if not _is_part(folder, request) and runs.is_claimed(folder, request, advice=advice):
        return read_json(folder / "metrics.json")
    where = resolve_device(device)
    inputs = load_inputs(config)
    chosen = inputs.dataset.choose(split, samples, seed, at_most=at_most)
    task = Task(config, inputs, adapter, device=where)
    examples = task.examples(chosen, config.evaluation_prompts)
    found, users = _score(task, examples, folder, request, progress), inputs.dataset.samples.user[chosen]
    result = {"split": split} | metrics.evaluate(found.labels, found.probabilities, users, seed=seed)
    _write(folder, found, result, request)
    return result


def _write(folder: Path, found: Predictions, result: dict[str, Any], request: dict[str, Any]) -> None:
    with atomic_folder(folder) as part:
        found.write(part)
        write_json(part / "metrics.json", result)
        write_json(part / "environment.json", runs.environment())
        write_json(part / "config.json", request)


def _is_part(folder: Path, request: dict[str, Any]) -> bool:
    """Whether a folder holds the result of fewer of the samples that are asked for."""
    if not (folder / "config.json").exists():
        return False
    found = read_json(folder / "config.json")
    fewer = found.get("samples") is not None and found["samples"] < (request["samples"] or math.inf)
    return fewer and _same_predictions(found, request) and found["seed"] == request["seed"]


def _same_predictions(found: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether two requests give a sample that both have the same probability."""
    names = ("run", "adapter", "inputs", "split")
    found, request = runs.without_execution(found), runs.without_execution(json.loads(json.dumps(request)))
    return all(found.get(name) == request[name] for name in names)


def _score(
    task: Task, examples: Examples, folder: Path, request: dict[str, Any], progress: bool
) -> Predictions:
    """Predictions of all prompts; what `folder` has from a smaller or a stopped evaluation is taken over.

    What has been scored is kept in a hidden folder there, which goes when the result takes its place.
    """
    samples, probabilities = examples.samples, np.zeros(len(examples))
    labels = task.inputs.dataset.samples.label[samples]
    is_known = np.zeros(len(examples), bool)
    for earlier in (folder, folder / _PART):
        path = earlier / "config.json"
        if path.exists() and _same_predictions(read_json(path), request):
            found = Predictions.read(earlier)
            _, rows, of = np.intersect1d(samples, found.samples, assume_unique=True, return_indices=True)
            probabilities[rows], is_known[rows] = found.probabilities[of], True
    left = np.flatnonzero(~is_known)
    left = left[np.argsort(-examples.lengths(left), kind="stable")]
    with tqdm(total=len(left), desc="score", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(left), _AT_ONCE):
            rows = left[start : start + _AT_ONCE]
            probabilities[rows] = predict_probabilities(
                task.model,
                task.collator,
                [examples[row] for row in rows],
                batch_size=task.config.eval_batch_size,
                done=bar.update,
            )
            is_known[rows] = True
            if not is_known.all():
                with atomic_folder(folder / _PART) as part:
                    Predictions(samples[is_known], labels[is_known], probabilities[is_known]).write(part)
                    write_json(part / "config.json", request)
    return Predictions(samples, labels, probabilities)


def _of_crm(crm: str, of: Predictions) -> np.ndarray:
    """What a CRM predicted of the samples that a run has predictions of, (n,)."""
    found = Predictions.read(crm).at(of.samples)
    if not np.array_equal(found.labels, of.labels):
        raise InputError(f"{found.path}: expected the labels of {of.path}, found those of other data")
    return found.probabilities


def _with_calibration(
    result: dict[str, Any], folder: Path, calibration: Calibration, data: str, seed: int
) -> dict[str, Any]:
    """The result with what a calibration makes of it; metrics.json follows, nothing is scored again."""
    plain = {key: value for key, value in result.items() if key != "calibrated"}
    found = plain
    if calibration != Calibration():
        known = Predictions.read(folder)
        beside = None if calibration.crm is None else _of_crm(calibration.crm, known)
        changed = calibration.apply(known.probabilities, beside)
        users = Dataset.load(data).samples.user[known.samples]
        values = calibrated_metrics(known.labels, changed, users, calibration, seed=seed)
        found = plain | {"calibrated": values}
    if found != result:
        write_json(folder / "metrics.json", found)
    return found
