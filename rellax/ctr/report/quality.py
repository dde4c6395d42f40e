"""The sections on how good the predictions are: metrics, ROC, calibration, history length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from sklearn.metrics import roc_curve

from rellax.ctr.metrics import ECE_BINS, ece, ece_bins, evaluate, paired_bootstrap
from rellax.ctr.report.charts import SHARE, Axis, Plot, figure, legend, series, swatch
from rellax.ctr.report.html import Child, details, node, table
from rellax.ctr.report.material import Material, Run, Scores
from rellax.ctr.report.words import (
    NONE,
    bold,
    code,
    missing,
    note,
    nothing,
    number,
    percent,
    says,
    whiskers,
    with_interval,
)

_EDGES = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)  # of history lengths
_IN_BIN = 20  # samples, at least
_POINTS = 150  # of an ROC curve
_FALSE_ALARMS = (0.1, 0.2, 0.5)
_SIMULATIONS = 200


def metrics(material: Material) -> list[Element]:
    """AUC with intervals and differences to the baseline, then every metric."""
    if not material.scored:
        return nothing(material)
    ranges = [scores.metrics["auc_interval"] for _, scores in material.scored]
    bounds = [bound for pair in ranges if pair is not None for bound in pair] + [0.5]
    low, high = min(bounds), max(bounds)
    rows, clear = [], []
    for run, scores in material.scored:
        values = scores.metrics
        difference, verdict = _difference(material, run, scores)
        clear += [verdict] if verdict else []
        bar = whiskers(values["auc"], values["auc_interval"], low, high, series(material.index(run)))
        auc = with_interval(values["auc"], values["auc_interval"])
        rows.append([_name(material, run), bar, auc, difference])
    baseline = "" if material.baseline is None else f" against {material.baseline.name}"
    head = ["run", "95 % interval", "AUC", f"difference{baseline}"]
    caption = f"AUC of each run; the lines go from {low:.2f} to {high:.2f}, dashed is 0.5, guessing"
    return [
        says(_best(material, clear)),
        table(caption, head, rows, class_="bars"),
        details("All metrics", _all_metrics(material)),
        *missing(material),
    ]


def _difference(material: Material, run: Run, scores: Scores) -> tuple[Child, str]:
    """Paired difference of AUC to the baseline, and whether it is clearly "higher" or "lower"."""
    base = material.baseline
    if base is None or base.scores is None or not material.shared:
        return NONE, ""
    if base is run:
        return "baseline", ""
    found = paired_bootstrap(
        scores.label,
        scores.probability,
        base.scores.probability,
        material.users(scores),
        bootstrap=material.draws,
        seed=material.seed,
    )
    if found["interval"] is None:
        return NONE, ""
    low, high = found["interval"]
    verdict = "higher" if low > 0 else "lower" if high < 0 else ""
    mark = {"higher": "▲ ", "lower": "▼ ", "": ""}[verdict]
    return node("span", f"{mark}{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]", class_="num"), verdict


def _best(material: Material, clear: Sequence[str]) -> list[Child]:
    with_auc = [(run, scores) for run, scores in material.scored if scores.metrics["auc"] is not None]
    if not with_auc:
        return ["There is no AUC: the samples all have the same answer."]
    best, scores = max(with_auc, key=lambda one: one[1].metrics["auc"])
    auc = with_interval(scores.metrics["auc"], scores.metrics["auc_interval"])
    sentence: list[Child] = ["The highest AUC has ", bold(best.name), ": ", auc]
    if not material.shared:
        own = "; the runs scored different samples, so their numbers compare only roughly. The same "
        return [*sentence, own, code("--samples"), " and ", code("--seed"), " give them the same ones."]
    count = f"{len(scores.sample):,}"
    if len(material.scored) == 1 or material.baseline is None:
        return [*sentence, f", on {count} samples."]
    others = len(material.scored) - 1
    higher, lower = clear.count("higher"), clear.count("lower")
    return [
        *sentence,
        f". All are on the same {count} samples; against ",
        bold(material.baseline.name),
        f", {higher} of the {others} other runs {'is' if higher == 1 else 'are'} clearly higher and {lower} "
        "clearly lower (▲ ▼: the interval of the paired difference leaves out zero).",
    ]


def _all_metrics(material: Material) -> Element:
    head = ["run", "samples", "Yes", "AUC", "GAUC", "LogLoss", "ACC", "ECE"]
    rows: list[list[Child]] = []
    for run, scores in material.scored:
        values = scores.metrics
        rows.append(
            [
                _name(material, run),
                f"{values['samples']:,}",
                percent(values["positives"] / values["samples"], 1),
                with_interval(values["auc"], values["auc_interval"]),
                number(values["gauc"]),
                with_interval(values["log_loss"], values["log_loss_interval"]),
                with_interval(values["acc"], values["acc_interval"]),
                number(values["ece"]),
            ]
        )
    caption = (
        f"All metrics on the {material.split} split, {material.draws:,} resamplings; GAUC is the AUC within "
        "users, ECE the calibration error"
    )
    return table(caption, head, rows)


def roc(material: Material) -> list[Element]:
    """All curves in one picture."""
    drawn = [(run, scores) for run, scores in material.scored if scores.metrics["auc"] is not None]
    if not drawn:
        return nothing(material)
    x, y = _named(SHARE, "of the No, called Yes"), _named(SHARE, "of the Yes, called Yes")
    plot = Plot("ROC curves of " + ", ".join(run.name for run, _ in drawn), x, y, height=340)
    plot.line([0, 1], [0, 1], "guess")
    rows: list[list[Child]] = []
    best = (-1.0, "")
    for run, scores in drawn:
        false, true, _ = roc_curve(scores.label, scores.probability)
        kept = np.unique(np.linspace(0, len(false) - 1, _POINTS).round().astype(int))
        plot.line(false[kept].tolist(), true[kept].tolist(), series(material.index(run)))
        found = np.interp(_FALSE_ALARMS, false, true)
        best = max(best, (float(found[1]), run.name))
        rows.append([_name(material, run), *map(percent, found)])
    sentence: list[Child] = [
        "Where a fifth of the No may be called Yes by mistake, ",
        bold(best[1]),
        f" finds {percent(best[0])} of the Yes; guessing would find {percent(0.2)}.",
    ]
    head = ["run", *map(percent, _FALSE_ALARMS)]
    caption = "Share of the Yes that are found, by share of the No that are called Yes"
    names = legend((series(material.index(run)), run.name) for run, _ in drawn)
    return [
        says(sentence),
        node("div", figure("ROC curves", plot.svg, names), table(caption, head, rows), class_="grid wide"),
    ]


def calibration(material: Material) -> list[Element]:
    """A reliability diagram for each run, before and after its calibration."""
    if not material.scored:
        return nothing(material)
    cards, gaps = [], []
    for run, scores in material.scored:
        cards.append(_reliability(material, run, scores))
        gaps.append((scores.metrics["ece"], run, float(scores.probability.mean() - scores.label.mean())))
    best, worst = min(gaps, key=lambda one: one[0]), max(gaps, key=lambda one: one[0])
    sentence: list[Child] = [
        "The probabilities of ",
        bold(best[1].name),
        f" are nearest to what happens: ECE {best[0]:.3f}, on average {_off(best[2])}",
    ]
    if len(gaps) > 1:
        sentence += [
            "; those of ",
            bold(worst[1].name),
            f" are farthest: {worst[0]:.3f}, on average {_off(worst[2])}",
        ]
    notes = [
        note(
            f"{run.name} is not calibrated: ",
            code(f"rellax calibrate {run.name} --work {material.work}"),
            " does it.",
        )
        for run, _ in material.scored
        if run.kind == "train" and run.calibration is None
    ]
    return [says([*sentence, "."]), node("div", cards, class_="grid"), *notes]


def _off(bias: float) -> str:
    return f"{abs(bias):.2f} too {'high' if bias > 0 else 'low'}"


def _reliability(material: Material, run: Run, scores: Scores) -> Element:
    class_ = series(material.index(run))
    plot = Plot(
        f"Reliability of {run.name}: share of Yes by predicted probability",
        _named(SHARE, "predicted probability"),
        _named(SHARE, "share of Yes"),
    )
    plot.line([0, 1], [0, 1], "guess")
    bins = _bins(scores.label, scores.probability)
    for low, high, count, _, _ in bins:
        plot.bar(low, high, 0.25 * count / len(scores.label), "count", f"{count:,} samples")
    for _, _, count, predicted, share in bins:
        plot.whisker(predicted, _wilson(share, count), class_)
        plot.dot(
            predicted, share, class_, title=f"{count:,} samples: predicted {predicted:.2f}, Yes {share:.2f}"
        )
    chance = _ece_by_chance(scores.probability, material.seed)
    remark: list[Child] = [f"ECE {scores.metrics['ece']:.3f}"]
    if run.calibration is not None and (after := material.calibrated(run, scores)) is not None:
        crm = run.calibration.crm
        values = evaluate(scores.label, after, bootstrap=0)
        after_bins = _bins(scores.label, after)
        plot.line([one[3] for one in after_bins], [one[4] for one in after_bins], f"{class_} after")
        how = (
            f"at its temperature of {run.calibration.temperature:.2f}"
            if crm is None
            else f"stacked on {Path(crm).name}"
        )
        remark.append(f"; {how} (thin line) {values['ece']:.3f}")
    remark.append(f". On {len(scores.label):,} samples even perfect probabilities show about {chance:.3f}.")
    return figure(run.name, plot.svg, node("p", remark))


def _bins(label: np.ndarray, probability: np.ndarray) -> list[tuple[float, float, int, float, float]]:
    """Those of the ECE that have samples: bounds, count, mean probability, share of Yes."""
    index, found = ece_bins(probability), []
    for one in np.unique(index):
        rows = index == one
        bounds = one / ECE_BINS, (one + 1) / ECE_BINS
        found.append((*bounds, int(rows.sum()), float(probability[rows].mean()), float(label[rows].mean())))
    return found


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return centre - half, centre + half


def _ece_by_chance(probability: np.ndarray, seed: int) -> float:
    """The mean ECE that these probabilities would have if they were exactly right."""
    rng = np.random.default_rng(seed)
    drawn = (rng.random(len(probability)) < probability for _ in range(_SIMULATIONS))
    return float(np.mean([ece(labels, probability) for labels in drawn]))


def by_history(material: Material) -> list[Element]:
    """AUC by the number of earlier behaviours, a card for each run."""
    if not material.scored:
        return nothing(material)
    lengths = material.lengths(material.scored[0][1])
    edges = _history_edges(np.concatenate([material.lengths(scores) for _, scores in material.scored]))
    names = [f"{low:,}{NONE}{high - 1:,}" for low, high in itertools.pairwise(edges)]
    found = {run.name: _by_bin(material, scores, edges) for run, scores in material.scored}
    bounds = [bound for bins in found.values() for one in bins for bound in (one["auc_interval"] or ())]
    x, y = Axis.of_names("earlier behaviours", names), Axis.over("AUC", [*bounds, 0.5])
    cards = []
    for run, _ in material.scored:
        plot = Plot(f"AUC of {run.name} by history length, other runs in grey", x, y)
        plot.line([-0.5, len(names) - 0.5], [0.5, 0.5], "guess")
        for other, bins in found.items():
            if other != run.name:
                plot.line(range(len(names)), [_nan(one["auc"]) for one in bins], "context")
        class_ = series(material.index(run))
        plot.line(range(len(names)), [_nan(one["auc"]) for one in found[run.name]], class_)
        for place, one in enumerate(found[run.name]):
            if one["auc"] is not None:
                plot.whisker(place, one["auc_interval"], class_)
                plot.dot(place, one["auc"], class_, title=f"{one['samples']:,} samples")
        cards.append(figure(run.name, plot.svg))
    rows: list[list[Child]] = [
        [
            name,
            f"{found[material.scored[0][0].name][place]['samples']:,}",
            *(with_interval(bins[place]["auc"], bins[place]["auc_interval"]) for bins in found.values()),
        ]
        for place, name in enumerate(names)
    ]
    caption = "AUC by the number of earlier behaviours, with 95 % intervals"
    head = ["earlier behaviours", "samples", *found]
    return [
        says(_history_sentence(material, found, names, lengths)),
        node("div", cards, class_="grid"),
        details("As a table", table(caption, head, rows)),
    ]


def _history_sentence(
    material: Material, found: dict[str, list[dict[str, Any]]], names: Sequence[str], lengths: np.ndarray
) -> list[Child]:
    run = max(material.scored, key=lambda one: one[1].metrics["auc"] or 0.0)[0]
    bins = found[run.name]
    known = [(one["auc"], place) for place, one in enumerate(bins) if one["auc"] is not None]
    start = f"Half of the samples have more than {int(np.median(lengths)):,} earlier behaviours; "
    if len(known) < 2:
        return [start, "there are too few of different lengths to tell them apart."]
    (_, low), (_, high) = min(known), max(known)
    apart = bins[high]["auc_interval"][0] > bins[low]["auc_interval"][1]
    return [
        start,
        bold(run.name),
        f" is best with {names[high]} ({bins[high]['auc']:.3f}) and weakest with {names[low]} "
        f"({bins[low]['auc']:.3f}), "
        + ("and their intervals do not meet." if apart else "but their intervals overlap."),
    ]


def _by_bin(material: Material, scores: Scores, edges: Sequence[int]) -> list[dict[str, Any]]:
    """Metrics within each bin; without an AUC where it has one answer only, or none."""
    place = np.digitize(material.lengths(scores), edges[1:-1])
    found: list[dict[str, Any]] = []
    for one in range(len(edges) - 1):
        rows = place == one
        if not rows.any():
            found.append({"samples": 0, "auc": None, "auc_interval": None})
            continue
        label, probability, users = scores.label[rows], scores.probability[rows], material.users(scores)[rows]
        found.append(evaluate(label, probability, users, bootstrap=material.draws, seed=material.seed))
    return found


def _history_edges(lengths: np.ndarray) -> list[int]:
    """Round bounds, far enough apart for each bin to have its samples."""
    enough = max(_IN_BIN, len(lengths) // 20)
    edges, last = [int(lengths.min())], int(lengths.max()) + 1
    for edge in _EDGES:
        inside = ((lengths >= edges[-1]) & (lengths < edge)).sum()
        if edges[-1] < edge < last and inside >= enough and (lengths >= edge).sum() >= enough:
            edges.append(edge)
    return [*edges, last]


def _name(material: Material, run: Run) -> Element:
    return node(
        "span",
        swatch(series(material.index(run))),
        " ",
        node("b", run.name),
        " ",
        node("small", run.what),
        class_="run",
    )


def _named(axis: Axis, label: str) -> Axis:
    return Axis(label, axis.low, axis.high, axis.ticks)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
