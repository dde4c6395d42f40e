"""The sections on the runs themselves: how training went, and what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from rellax._files import read_json
from rellax.ctr.report.charts import Axis, Plot, figure, series
from rellax.ctr.report.html import Child, details, node, table
from rellax.ctr.report.material import Material, Run
from rellax.ctr.report.words import NONE, bold, code, note, says

_SMOOTHED = 30  # losses, from which on a running mean is drawn as well


def curves(material: Material) -> list[Element]:
    """Loss and validation metric by step, and the step that was kept."""
    cards, kept, notes = [], [], []
    for run in material.runs:
        validation = _validation(run)
        if run.kind == "zero-shot":
            continue
        if not run.result:
            command = code(f"rellax train {run.name} …")
            notes.append(note(f"{run.name} is not finished: the same ", command, " goes on with it."))
        pictures = [*_loss(material, run), *_validated(material, run, validation)]
        cards += [figure(run.name, picture) for picture in pictures]
        if run.result and validation:
            kept.append((run, validation))
    if not cards:
        return [says(["None of these runs was trained."]), *notes]
    return [says(_kept(kept)), node("div", cards, class_="grid"), *notes]


def _kept(kept: Sequence[tuple[Run, list[tuple[int, float]]]]) -> list[Child]:
    if not kept:
        return ["No run is finished, so no step was chosen yet."]
    rising = [run.name for run, validation in kept if run.result["best_step"] == validation[-1][0]]
    parts: list[Child] = ["Kept is the step that was best on the validation split: "]
    for place, (run, validation) in enumerate(kept):
        best = dict(validation)[run.result["best_step"]]
        parts += [", " if place else "", bold(run.name), f" at {run.result['best_step']} ({best:.3f})"]
    if rising:
        whose = "all of them" if len(rising) == len(kept) > 1 else ", ".join(rising)
        parts.append(f"; for {whose} that was the last one, so longer training may still help")
    return [*parts, "."]


def _validation(run: Run) -> list[tuple[int, float]]:
    """Step and value of the metric that chose the step."""
    if run.kind == "crm":
        return [(int(step), float(auc)) for step, auc in run.result.get("valid_auc", [])]
    metric = f"validation_{run.config.get('select', 'auc')}"
    return [(entry["step"], entry[metric]) for entry in run.log if entry.get(metric) is not None]


def _loss(material: Material, run: Run) -> list[Element]:
    entries = [(entry["step"], entry["loss"]) for entry in run.log if "loss" in entry]
    if not entries:
        return []
    steps, losses = zip(*entries, strict=True)
    x, y = _steps(steps), Axis.over("training loss", losses)
    plot = Plot(f"Training loss of {run.name} by step", x, y)
    class_ = series(material.index(run))
    if len(losses) >= _SMOOTHED:
        window = len(losses) // 10
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        plot.line(steps, losses, "context")
        plot.line(steps[window - 1 :], smooth.tolist(), class_)
    else:
        plot.line(steps, losses, class_)
    _mark(plot, run)
    return [plot.svg]


def _validated(material: Material, run: Run, validation: Sequence[tuple[int, float]]) -> list[Element]:
    if not validation:
        return []
    steps, values = zip(*validation, strict=True)
    name = "log loss" if run.config.get("select") == "log_loss" else "AUC"
    plot = Plot(
        f"Validation {name} of {run.name} by step", _steps(steps), Axis.over(f"validation {name}", values)
    )
    class_ = series(material.index(run))
    plot.line(steps, values, class_)
    for step, value in validation:
        plot.dot(step, value, class_, title=f"step {step}: {value:.4f}")
    _mark(plot, run)
    return [plot.svg]


def _steps(steps: Sequence[int]) -> Axis:
    return Axis.counting("step", 0, max(steps))


def _mark(plot: Plot, run: Run) -> None:
    if run.result:
        plot.mark(run.result["best_step"], f"kept: {run.result['best_step']}")


def settings(material: Material) -> list[Element]:
    """What the runs were asked for, first where they differ, and the machines they ran on."""
    machines = [[run.name, _machine(run, material.split)] for run in material.runs]
    language = [run for run in material.runs if run.kind != "crm"]
    classical = [run for run in material.runs if run.kind == "crm"]
    return [
        says(["What was asked for, from each run's config.json, and where it ran."]),
        *_settings("Language models", language),
        *_settings("Classical models", classical),
        details("Machines", table("What the runs ran on", ["run", "machine"], machines)),
    ]


def _settings(title: str, runs: Sequence[Run]) -> list[Element]:
    fields = dict.fromkeys(field for run in runs for field in run.config if field != "inputs")
    values = {field: [_shown(run.config.get(field)) for run in runs] for field in fields}
    differing = [[field, *row] for field, row in values.items() if len(set(row)) > 1]
    common = [[field, row[0]] for field, row in values.items() if len(set(row)) == 1]
    tables = []
    if differing:
        tables.append(table("Where they differ", ["setting", *(run.name for run in runs)], differing))
    if common:
        tables.append(table("In common", ["setting", "value"], common))
    return [details(f"{title}: {len(runs)}", tables)] if tables else []


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machine(run: Run, split: str) -> str:
    paths = [run.folder / "environment.json", run.folder / split / "environment.json"]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return NONE
    found = read_json(path)
    where = ", ".join(found.get("gpus") or ()) or f"{found.get('cpu')}, {found.get('threads')} threads"
    packages = found.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("rellax", "torch") if packages.get(name))
    return f"{where}; {versions}"
