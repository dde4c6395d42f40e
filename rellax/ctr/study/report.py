"""What a study found, as Markdown: the targets, tables and figures, and a line of CSV for each run."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from rellax import subr
from rellax._files import atomic_file, read_json
from rellax.ctr.config import StudyConfig, recent_behaviours
from rellax.ctr.dataset import Dataset
from rellax.ctr.methods import METHODS
from rellax.ctr.prompts import recent, with_recent
from rellax.ctr.retrieval import read_positions
from rellax.ctr.runs import machine
from rellax.ctr.study import figures
from rellax.ctr.study.results import HISTORY_BINS, METRICS, Finished, Result, Results, Scored, signed
from rellax.ctr.study.targets import verdicts


def write(
    out: Path,
    config: StudyConfig,
    dataset: Dataset,
    test: Scored,
    finished: Sequence[Finished],
    planned: int,
) -> str:
    """Write report.md, results.csv and figures to `out`; returns the report.

    Args:
        planned: runs of the whole grid that have results.
    """
    results = Results(
        finished, test, partial(dataset.choose, "valid", config.validation_samples, at_most=True)
    )
    _write_csv(out / "results.csv", finished)
    sections = [_what(config, dataset, test, finished, planned), _targets(results)]
    if results.ks:
        shots = max(results.shots, default=0)
        k = results.chosen_k(shots)
        sections.append(_main_table(results, k, shots))
        if shots and results.best_classical(None) is not None:
            sections.append(_stacked(results, k, shots))
        sections += [_by_k(results, n) for n in (results.shots or [0])]
        figures.by_k(out / "auc-by-k.png", results)
        sections.append("![AUC by K](auc-by-k.png)")
        if len(results.shots) > 1:
            sections.append(_by_shots(results, k))
            figures.by_shots(out / "auc-by-shots.png", results, k)
            sections.append("![AUC by shots](auc-by-shots.png)")
        sections.append(_by_history(results, k, shots))
        figures.by_history(out / "auc-by-history.png", results, k, shots)
        sections.append("![AUC by length of the user's history](auc-by-history.png)")
        unlike = _unlikeness(out, config, dataset, test, results.ks)
        sections.append(_heterogeneity(results.ks, unlike))
        figures.heterogeneity(out / "heterogeneity.png", results.ks, unlike)
        sections.append("![Heterogeneity by K](heterogeneity.png)")
    sections.append(_machine(out, config))
    text = "\n\n".join(sections) + "\n"
    with atomic_file(out / "report.md") as part:
        part.write_text(text, encoding="utf-8")
    return text


def _what(
    config: StudyConfig, dataset: Dataset, test: Scored, finished: Sequence[Finished], planned: int
) -> str:
    counts, meta = dataset.meta["counts"], dataset.meta
    model = "SmolLM2-135M-Instruct" if config.model is None else Path(config.model).name
    reads = {
        "all": "all training samples",
        "held-out": "all training samples but the language model's shots",
        "shots": "the language model's shots alone",
    }[config.crm_samples]
    held_out = any(METHODS[name].crm_samples for name in config.methods)
    own = ", what is boosted one that was not trained on the shots" if held_out else ""
    share = config.recent_share
    blend = f" Of K retrieved behaviours {share:.0%} are the most recent ones." if share else ""
    missing = planned - len(finished)
    partial = f" **{missing} of {planned} runs of the grid are not finished yet.**" if missing > 0 else ""
    return (
        f"# {meta['name']}: methods, K, shots and seeds on the same {len(test.rows):,} test samples\n\n"
        f"{counts['users']:,} users, {counts['items']:,} items, {counts['samples']:,} samples. {model}. "
        f"Gates and soft prompts read a {config.crm} that was trained on {reads}{own}.{blend} Steps, K and "
        "the best classical model are chosen on validation samples. ±: standard deviation over seeds; "
        f"without it, one run.{partial}"
    )


def _targets(results: Results) -> str:
    table = _table(["target", "verdict", "what decides it"], verdicts(results))
    note = (
        "*level*: met or missed by no more than chance would do. p values are of 1,000 resamplings of whole "
        "users, so 0.002 is the smallest."
    )
    return "\n".join(["## Targets", "", note, "", *table])


def _main_table(results: Results, k: int, shots: int) -> str:
    baselines = {"same shots": results.best_classical(shots), "all samples": results.best_classical(None)}
    known = {name: best for name, best in baselines.items() if best is not None}
    head = [
        "method",
        *METRICS.values(),
        *(f"AUC less {best.method}, {name}" for name, best in known.items()),
    ]
    rows = []
    for result in results.rows(k, shots):
        cells = [result.title, *(result.show(name) for name in METRICS)]
        for best in known.values():
            cells.append("-" if best is result else signed(results.compare(result, best)))
        rows.append(cells)
    return "\n".join([f"## K = {k}, {shots:,} shots", "", *_table(head, rows)])


def _stacked(results: Results, k: int, shots: int) -> str:
    """What each method knows that the best classical model does not."""
    best = results.best_classical(None)
    assert best is not None, "`write` has looked"
    head = ["method", "seeds", "AUC alone", f"AUC stacked on {best.method}", f"less {best.method} alone"]
    lines = [
        f"## Stacked on {best.method}, all training samples: K = {k}, {shots:,} shots",
        "",
        f"A logistic regression on the log-odds of a method and of {best.method}, fitted on the validation "
        "samples: `rellax calibrate NAME --crm CRM`.",
        "",
    ]
    rows = []
    for result in results.rows(k, shots):
        if result is best:
            continue
        both, alone = results.stacked(result, best)
        if len(both):
            aucs = [roc_auc_score(results.test.labels, one) for one in both]
            less = signed(results.compare_probabilities(both, alone))
            rows.append([result.title, str(len(both)), result.show("auc"), f"{np.mean(aucs):.3f}", less])
    return "\n".join([*lines, *_table(head, rows)])


def _by_k(results: Results, shots: int) -> str:
    found = [
        (kind.title, [results.get(name, k, shots) for k in results.ks]) for name, kind in METHODS.items()
    ]
    table = _aucs([f"K = {k}" for k in results.ks], found)
    return "\n".join([f"## AUC by K, {shots:,} shots", "", *table])


def _by_shots(results: Results, k: int) -> str:
    found = [(title, [results.get(name, k, n) for n in results.shots]) for title, name in results.trained()]
    table = _aucs([f"{n:,}" for n in results.shots], found)
    return "\n".join([f"## AUC by shots, K = {k}", "", *table])


def _aucs(columns: Sequence[str], found: Iterable[tuple[str, Sequence[Result | None]]]) -> list[str]:
    """Of each method that has any."""
    rows = [
        [title, *("-" if result is None else result.show("auc") for result in results)]
        for title, results in found
        if any(results)
    ]
    return _table(["method", *columns], rows)


def _by_history(results: Results, k: int, shots: int) -> str:
    found, rows = results.rows(k, shots), []
    if found:
        rows.append(["samples", *(f"{count:,}" for count, _ in results.by_history(found[0]))])
    for result in found:
        aucs = ["-" if auc is None else f"{auc:.3f}" for _, auc in results.by_history(result)]
        rows.append([result.title, *aucs])
    title = f"## AUC by length of the user's history, K = {k}, {shots:,} shots"
    return "\n".join([title, "", *_table(["method", *HISTORY_BINS], rows)])


def _unlikeness(
    out: Path, config: StudyConfig, dataset: Dataset, test: Scored, ks: Sequence[int]
) -> dict[tuple[str, str], list[float]]:
    """Mean of 1 - cosine of a prompt's behaviours to each other and to the target, for `ks`."""
    embeddings = subr.load_embeddings(out / "embeddings").numpy()
    nearest = read_positions(out / "retrieved", dataset, max(ks))[test.rows]
    latest = recent(test.histories, max(ks))
    start = dataset.offsets[test.users]
    targets = embeddings[dataset.samples.item[test.rows]]
    found: dict[tuple[str, str], list[float]] = {}
    for title, positions in (("recent", latest), ("retrieved", nearest)):
        within, apart = found[title, "each other"], found[title, "the target"] = [], []
        for k in ks:
            shown = positions[:, :k]
            if positions is nearest:
                shown = with_recent(shown, test.histories, recent_behaviours(config.recent_share, k))
            there = shown >= 0
            items = dataset.behaviour_items[np.where(there, start[:, None] + shown, 0)]
            rows = embeddings[items] * there[..., None]
            count = there.sum(axis=1)
            total = rows.sum(axis=1)
            many = count > 1
            # The sum over all ordered pairs is |total|^2 less each row's product with itself, 1.
            pairs = ((total**2).sum(axis=1) - count)[many] / (count * (count - 1))[many]
            within.append(1 - _mean(pairs))
            some = count > 0
            apart.append(1 - _mean((total * targets).sum(axis=1)[some] / count[some]))
    return found


def _mean(values: np.ndarray) -> float:
    """NaN where there are none."""
    return float(values.mean()) if len(values) else math.nan


def _heterogeneity(ks: Sequence[int], found: dict[tuple[str, str], list[float]]) -> str:
    """How unlike each other, and the target, the behaviours of a prompt are, by K."""
    lines = [
        "## Heterogeneity of the behaviours in a prompt",
        "",
        "Mean of 1 - cosine over their pairs, and of each and the target, in the embeddings of retrieval.",
        "",
    ]
    rows = [
        [f"{who}: {other}", *("-" if math.isnan(value) else f"{value:.3f}" for value in values)]
        for (who, other), values in found.items()
    ]
    return "\n".join([*lines, *_table(["behaviours", *(f"K = {k}" for k in ks)], rows)])


def _machine(out: Path, config: StudyConfig) -> str:
    """Where runs were trained and scored, which the one who writes the report need not be."""
    records = [read_json(path) for place in ("*", "*/test") for path in out.glob(f"{place}/environment.json")]
    places = Counter(", ".join(r["gpus"]) or f"{r['cpu']}, {r['threads']} threads" for r in records)
    where = "; ".join(f"{place} ({count})" for place, count in places.most_common())
    times = read_json(out / "steps.json") if (out / "steps.json").exists() else {}
    hours = sum(step["seconds"] for step in times.values()) / 3600
    took = f" {len(times)} steps, whose time is recorded, took {hours:.1f} hours." if times else ""
    return (
        f"## Environment\n\nTrained or scored on: {where}.{took} This page was written on: {machine()}\n\n"
        f"```\n{_command(config)}\n```"
    )


def _command(config: StudyConfig) -> str:
    words = ["rellax", "reproduce"]
    for name, value in asdict(config).items():
        values, default = (
            tuple(one) if isinstance(one, list | tuple) else (one,)  # the command line gives lists
            for one in (value, getattr(StudyConfig, name))
        )
        if values != default:
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def _write_csv(path: Path, finished: Sequence[Finished]) -> None:
    """A line for each run."""
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "k", "shots", "seed", "validation_auc", *METRICS])
        for run in finished:
            cell = run.cell
            shots = "all" if cell.shots is None else cell.shots
            row: list[Any] = [cell.method, cell.k, shots, cell.seed]
            row += [
                None if value is None else round(value, 6)
                for value in (run.validation, *map(run.metrics.get, METRICS))
            ]
            writer.writerow(["" if value is None else value for value in row])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
