"""The figures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rellax._files import atomic_file
from rellax.ctr.config import CRM_MODELS
from rellax.ctr.methods import METHODS
from rellax.ctr.study.results import HISTORY_BINS, Result, Results

_NAMES = (*METHODS, *CRM_MODELS)  # a colour each, the same in all panels and figures


def by_k(path: Path, results: Results) -> None:
    """AUC by K, a panel for the untrained model and for each number of shots."""
    panels = [("untrained", 0), *((f"{n:,} shots", n) for n in results.shots)]
    figure, axes = _panels(len(panels), "K, behaviours in a prompt")
    for axis, (title, n) in zip(axes, panels, strict=True):
        axis.set_title(title)
        for method, what in METHODS.items():
            if (what.stage is None) == (n == 0):
                _draw(axis, results.curve(method, n), what.title)
        axis.set_xticks(results.ks)
    _save(figure, axes, path)


def by_shots(path: Path, results: Results, k: int) -> None:
    """AUC by training samples; classical models dotted."""
    figure, axes = _panels(1, "training samples")
    axes[0].set_title(f"K = {k}")
    axes[0].set_xscale("log", base=2)
    for title, method in results.trained():
        found = [(n, results.get(method, k, n)) for n in results.shots]
        _draw(
            axes[0],
            [(n, result) for n, result in found if result is not None],
            title,
            line="-" if method in METHODS else ":",
        )
    best = results.best_classical(None)
    if best is not None:
        axes[0].axhline(best.auc, color="0.4", linestyle="--", label=f"{best.method}, all training samples")
    axes[0].set_xticks(results.shots, [f"{n:,}" for n in results.shots])
    _save(figure, axes, path)


def by_history(path: Path, results: Results, k: int, shots: int) -> None:
    """AUC by length of the user's history; of classical models, the best on validation samples."""
    best = (results.best_classical(shots), results.best_classical(None))
    figure, axes = _panels(1, "earlier behaviours of the user")
    axes[0].set_title(f"K = {k}, {shots:,} shots" if shots else f"K = {k}")
    for result in results.rows(k, shots):
        if result.method in METHODS or any(result is one for one in best):
            found = [np.nan if auc is None else auc for _, auc in results.by_history(result)]
            line = "-" if result.method in METHODS else ":" if result.shots else "--"
            axes[0].plot(
                list(HISTORY_BINS),
                found,
                marker="o",
                linestyle=line,
                color=_colour(result),
                label=result.title,
            )
    _save(figure, axes, path)


def heterogeneity(path: Path, ks: Sequence[int], found: dict[tuple[str, str], list[float]]) -> None:
    """How far behaviours are from each other, and from the target, by K.

    Args:
        found: values for `ks`, by which behaviours and what they are compared with.
    """
    panels = list(dict.fromkeys(other for _, other in found))
    figure, axes = _panels(len(panels), "K, behaviours in a prompt", "1 - cosine")
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(f"from {panel}")
        axis.set_xticks(list(ks))
        for (behaviours, other), values in found.items():
            if other == panel:
                axis.plot(list(ks), values, marker="o", label=behaviours)
    _save(figure, axes, path)


def _panels(count: int, label: str, value: str = "test AUC") -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    columns = min(count, 3)
    width = 4.6 * max(columns, 1.8)  # the legend has to fit beneath one panel too
    figure = Figure(figsize=(width, 4.2 * -(-count // columns)), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, sharey=True).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.set_xlabel(label)
        axis.set_ylabel(value)
        axis.grid(alpha=0.3)
    return figure, axes[:count]


def _draw(axis: Any, points: Sequence[tuple[int, Result]], title: str, *, line: str = "-") -> None:
    if points:
        spread = [result.metrics["auc"] or (np.nan, 0.0) for _, result in points]
        axis.errorbar(
            [x for x, _ in points],
            [mean for mean, _ in spread],
            [deviation for _, deviation in spread],
            marker="o",
            capsize=2,
            linestyle=line,
            color=_colour(points[0][1]),
            label=title,
        )


def _colour(result: Result) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20"](_NAMES.index(result.method))


def _save(figure: Any, axes: Any, path: Path) -> None:
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small")
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
