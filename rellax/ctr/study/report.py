"""What a study found: tables, figures, and its targets, each with the numbers that decide it."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from rellax import subr
from rellax._files import atomic_file, read_json
from rellax.ctr import metrics
from rellax.ctr.config import StudyConfig, recent_behaviours
from rellax.ctr.dataset import Dataset
from rellax.ctr.methods import METHODS, Method
from rellax.ctr.prompts import recent, with_recent
from rellax.ctr.retrieval import read_positions
from rellax.ctr.runs import machine
from rellax.ctr.study.results import HISTORY_BINS, METRICS, Finished, Result, Results, Scored

_FEW_SHOTS = 8192
_LEVEL = 0.05


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
    results = Results(finished, test, partial(dataset.choose, "valid", config.validation_samples))
    _write_csv(out / "results.csv", finished)
    sections = [_what(config, dataset, test, finished, planned), _targets(results)]
    shots, ks = results.axis(2), results.axis(1)
    if ks:
        k = _chosen_k(results, ks, shots)
        sections += [_main_table(results, k, shots[-1] if shots else 0)]
        sections += [_stacked(results, k, shots[-1])] if shots and results.best_classical(None) else []
        sections += [_by_k(results, ks, n) for n in (shots or [0])]
        _plot_by_k(out / "auc-by-k.png", results, ks, shots)
        sections.append("![AUC by K](auc-by-k.png)")
        if len(shots) > 1:
            sections.append(_by_shots(results, k, shots))
            _plot_by_shots(out / "auc-by-shots.png", results, k, shots)
            sections.append("![AUC by shots](auc-by-shots.png)")
        sections.append(_by_history(results, k, shots[-1] if shots else 0))
        sections.append(_heterogeneity(out, config, dataset, test, ks))
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
    lines = ["## Targets", "", "| target | verdict | what decides it |", "|---|---|---|"]
    for title, decide in _TARGETS.items():
        verdict, detail = decide(results)
        lines.append(f"| {title} | {verdict} | {detail} |")
    return "\n".join(lines)


def _subr_beats_recent(pair: tuple[str, str]) -> Callable[[Results], tuple[str, str]]:
    def decide(results: Results) -> tuple[str, str]:
        shots = 0 if METHODS[pair[0]].stage is None else max(results.axis(2), default=0)
        ks = [k for k in results.axis(1) if k >= 10]
        found = [(k, results.get(pair[0], k, shots), results.get(pair[1], k, shots)) for k in ks]
        known = [(k, a, b) for k, a, b in found if a is not None and b is not None]
        if not known:
            return "not run", "-"
        verdict = "met" if all(a.auc > b.auc for _, a, b in known) else "missed"
        return verdict, "; ".join(f"K = {k}: {a.auc:.3f} against {b.auc:.3f}" for k, a, b in known)

    return decide


def _no_fall(results: Results) -> tuple[str, str]:
    """Of the best method that has run at several K, with the most shots."""
    for method in ("rellax", "rella", "lora-retrieved", "zero-shot-retrieved"):
        for shots in results.axis(2)[::-1] or [0]:
            curve = _curve(results, method, shots)
            if len(curve) > 1:
                return _falls(results, METHODS[method], shots, curve)
    return "not run", "-"


def _falls(
    results: Results, method: Method, shots: int, curve: Sequence[tuple[int, Result]]
) -> tuple[str, str]:
    (best_k, best), (_, last) = max(curve[:-1], key=lambda one: one[1].auc), curve[-1]
    result = results.compare(last, best)
    fell = result["interval"] is not None and result["interval"][1] < 0
    values = ", ".join(f"{k}: {r.auc:.3f}" for k, r in curve)
    return (
        "missed" if fell else "met",
        f"{method.title}{f', {shots:,} shots' if method.stage else ''}: {values}; last less K = {best_k} "
        f"{_signed(result)}",
    )


def _beats(a: str, b: str) -> Callable[[Results], tuple[str, str]]:
    def decide(results: Results) -> tuple[str, str]:
        shots, ks = max(results.axis(2), default=0), results.axis(1)
        k = _chosen_k(results, ks, [shots]) if ks else 0
        first, second = results.get(a, k, shots), results.get(b, k, shots)
        if first is None or second is None:
            return "not run", "-"
        result = results.compare(first, second)
        return _verdict(result), f"K = {k}, {shots:,} shots: {_signed(result)}"

    return decide


def _verdict(result: dict[str, Any]) -> str:
    """Of a target that asks for more than chance."""
    better = result["difference"] is not None and result["difference"] > 0 and result["p_value"] < _LEVEL
    return "met" if better else "missed"


def _stacked_beats_classical(method: str) -> Callable[[Results], tuple[str, str]]:
    def decide(results: Results) -> tuple[str, str]:
        k, shots = _decisive(results)
        ours, best = results.get(method, k, shots), results.best_classical(None)
        if ours is None or best is None:
            return "not run", "-"
        both, alone = results.stacked(ours, best)
        if not len(both):
            return "not run", "-"
        result = metrics.paired_bootstrap(results.test.labels, both, alone)
        return _verdict(result), f"K = {k}, {shots:,} shots, {best.method}: {_signed(result)}"

    return decide


def _beats_classical(method: str) -> Callable[[Results], tuple[str, str]]:
    def decide(results: Results) -> tuple[str, str]:
        k, shots = _decisive(results)
        ours, best = results.get(method, k, shots), results.best_classical(None)
        if ours is None or best is None:
            return "not run", "-"
        result = _signed(results.compare(ours, best))
        return (
            "met" if ours.auc > best.auc else "missed",
            f"K = {k}, {shots:,} shots: {ours.auc:.3f} against {best.method} {best.auc:.3f}, {result}",
        )

    return decide


def _decisive(results: Results) -> tuple[int, int]:
    """K, and the largest number of shots that is still few."""
    shots = max((n for n in results.axis(2) if n <= _FEW_SHOTS), default=0)
    ks = results.axis(1)
    return _chosen_k(results, ks, [shots]) if ks else 0, shots


_TARGETS: dict[str, Callable[[Results], tuple[str, str]]] = {
    "SUBR above recent at every K ≥ 10, zero-shot": _subr_beats_recent(
        ("zero-shot-retrieved", "zero-shot-recent")
    ),
    "SUBR above recent at every K ≥ 10, trained": _subr_beats_recent(("lora-retrieved", "lora-recent")),
    "no fall of AUC as K grows": _no_fall,
    "ReLLaX above ReLLa, p < 0.05": _beats("rellax", "rella"),
    "ReLLa above LoRA on recent prompts, p < 0.05": _beats("rella", "lora-recent"),
    "ReLLaX with at most 8,192 shots above the best classical model on all samples": _beats_classical(
        "rellax"
    ),
    "the same, boosted from the classical model": _beats_classical("rellax-boosted"),
    "the same, boosted and stacked on that model, p < 0.05": _stacked_beats_classical("rellax-boosted"),
}


def _curve(results: Results, method: str, shots: int) -> list[tuple[int, Result]]:
    found = [(k, results.get(method, k, shots)) for k in results.axis(1)]
    return [(k, result) for k, result in found if result is not None]


def _chosen_k(results: Results, ks: Sequence[int], shots: Sequence[int]) -> int:
    """The K at which the last trained method did best on the validation samples; else the middle one."""
    n = shots[-1] if shots else 0
    for method in reversed(METHODS):
        scored = {k: r.validation for k, r in _curve(results, method, n) if r.validation is not None}
        if scored:
            return max(scored, key=lambda k: scored[k])
    return ks[len(ks) // 2]


def _rows(results: Results, k: int, shots: int) -> list[Result]:
    """All methods at one K and number of shots, the classical models on these shots and on all samples."""
    found = [results.get(method, k, shots) for method in METHODS]
    classical = dict.fromkeys(key[0] for key in results.all if key[0] not in METHODS)
    found += [results.get(name, None, shots) for name in classical]
    found += [results.get(name, None, None) for name in classical]
    return [result for result in found if result is not None]


def _main_table(results: Results, k: int, shots: int) -> str:
    baselines = {"same shots": results.best_classical(shots), "all samples": results.best_classical(None)}
    known = {name: best for name, best in baselines.items() if best is not None}
    head = [
        "method",
        *METRICS.values(),
        *(f"AUC less {best.method}, {name}" for name, best in known.items()),
    ]
    lines = [f"## K = {k}, {shots:,} shots", "", _row(head), _row(["---"] * len(head))]
    for result in _rows(results, k, shots):
        cells = [result.title, *(result.show(name) for name in METRICS)]
        for best in known.values():
            cells.append("-" if best is result else _signed(results.compare(result, best)))
        lines.append(_row(cells))
    return "\n".join(lines)


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
        _row(head),
        _row(["---"] * len(head)),
    ]
    for result in _rows(results, k, shots):
        if result is best:
            continue
        both, alone = results.stacked(result, best)
        if len(both):
            aucs = [roc_auc_score(results.test.labels, one) for one in both]
            less = _signed(metrics.paired_bootstrap(results.test.labels, both, alone))
            cells = [result.title, str(len(both)), result.show("auc"), f"{np.mean(aucs):.3f}", less]
            lines.append(_row(cells))
    return "\n".join(lines)


def _by_k(results: Results, ks: Sequence[int], shots: int) -> str:
    lines = [f"## AUC by K, {shots:,} shots", "", _row(["method", *(f"K = {k}" for k in ks)])]
    lines.append(_row(["---"] * (len(ks) + 1)))
    for method in METHODS:
        found = [results.get(method, k, shots) for k in ks]
        if any(found):
            cells = ["-" if result is None else result.show("auc") for result in found]
            lines.append(_row([METHODS[method].title, *cells]))
    return "\n".join(lines)


def _by_shots(results: Results, k: int, shots: Sequence[int]) -> str:
    lines = [f"## AUC by shots, K = {k}", "", _row(["method", *(f"{n:,}" for n in shots)])]
    lines.append(_row(["---"] * (len(shots) + 1)))
    for title, method in _trained(results):
        found = [results.get(method, k, n) for n in shots]
        if any(found):
            cells = ["-" if result is None else result.show("auc") for result in found]
            lines.append(_row([title, *cells]))
    return "\n".join(lines)


def _by_history(results: Results, k: int, shots: int) -> str:
    bounds = [f"{low} to {high - 1}" for low, high in itertools.pairwise(HISTORY_BINS)]
    bounds[0] = f"under {HISTORY_BINS[1]}"
    head = ["method", *bounds, f"{HISTORY_BINS[-1]} and more"]
    lines = [f"## AUC by length of the user's history, K = {k}, {shots:,} shots", "", _row(head)]
    lines.append(_row(["---"] * len(head)))
    rows = _rows(results, k, shots)
    if rows:
        lines.append(_row(["samples", *(f"{count:,}" for count, _ in results.by_history(rows[0]))]))
    for result in rows:
        aucs = ["-" if auc is None else f"{auc:.3f}" for _, auc in results.by_history(result)]
        lines.append(_row([result.title, *aucs]))
    return "\n".join(lines)


def _heterogeneity(out: Path, config: StudyConfig, dataset: Dataset, test: Scored, ks: Sequence[int]) -> str:
    """How unlike each other, and the target, the behaviours of a prompt are, by K."""
    embeddings = subr.load_embeddings(out / "embeddings").numpy()
    nearest = read_positions(out / "retrieved", dataset, max(ks))[test.rows]
    latest = recent(test.histories, max(ks))
    start = dataset.offsets[test.users]
    targets = embeddings[dataset.samples.item[test.rows]]
    lines = [
        "## Heterogeneity of the behaviours in a prompt",
        "",
        "Mean of 1 - cosine over their pairs, and of each and the target, in the embeddings of retrieval.",
        "",
        _row(["behaviours", *(f"K = {k}" for k in ks)]),
        _row(["---"] * (len(ks) + 1)),
    ]
    for title, positions in (("recent", latest), ("retrieved", nearest)):
        within, apart = [], []
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
            within.append(f"{1 - pairs.mean():.3f}")
            some = count > 0
            apart.append(f"{1 - ((total * targets).sum(axis=1)[some] / count[some]).mean():.3f}")
        lines += [_row([f"{title}: each other", *within]), _row([f"{title}: the target", *apart])]
    return "\n".join(lines)


def _machine(out: Path, config: StudyConfig) -> str:
    times = read_json(out / "steps.json") if (out / "steps.json").exists() else {}
    hours = sum(step["seconds"] for step in times.values()) / 3600
    took = f" {len(times)} runs took {hours:.1f} hours." if times else ""
    return f"## Environment\n\n{machine()}{took}\n\n```\n{_command(config)}\n```"


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


def _trained(results: Results) -> list[tuple[str, str]]:
    """Title and name of the methods that shots mean something to, classical models included."""
    names = dict.fromkeys(key[0] for key in results.all if key[2])
    return [(METHODS[name].title if name in METHODS else name, name) for name in names]


def _plot_by_k(path: Path, results: Results, ks: Sequence[int], shots: Sequence[int]) -> None:
    panels = [("untrained", 0), *((f"{n:,} shots", n) for n in shots)]
    figure, axes = _panels(len(panels), "K, behaviours in a prompt")
    for axis, (title, n) in zip(axes, panels, strict=True):
        axis.set_title(title)
        for method, what in METHODS.items():
            if (what.stage is None) == (n == 0):
                _draw(axis, [(k, result) for k, result in _curve(results, method, n)], what.title)
        axis.set_xticks(list(ks))
    _save(figure, axes, path)


def _plot_by_shots(path: Path, results: Results, k: int, shots: Sequence[int]) -> None:
    figure, axes = _panels(1, "training samples")
    axes[0].set_title(f"K = {k}")
    axes[0].set_xscale("log", base=2)
    for title, method in _trained(results):
        found = [(n, results.get(method, k, n)) for n in shots]
        _draw(
            axes[0],
            [(n, result) for n, result in found if result is not None],
            title,
            line="-" if method in METHODS else ":",
        )
    best = results.best_classical(None)
    if best is not None:
        axes[0].axhline(best.auc, color="0.4", linestyle="--", label=f"{best.method}, all training samples")
    axes[0].set_xticks(list(shots), [f"{n:,}" for n in shots])
    _save(figure, axes, path)


def _panels(count: int, label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    columns = min(count, 3)
    figure = Figure(figsize=(4.6 * columns, 4.2 * -(-count // columns)), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, sharey=True).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.set_xlabel(label)
        axis.set_ylabel("test AUC")
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
            label=title,
        )


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


def _signed(result: dict[str, Any]) -> str:
    if result["difference"] is None:
        return "-"
    low, high = result["interval"]
    return f"{result['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p = {result['p_value']:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
