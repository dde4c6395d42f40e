"""The demo's page: table, picture, and remarks that are computed from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rellax._files import atomic_file
from rellax.ctr.config import recent_behaviours
from rellax.ctr.metrics import paired_bootstrap
from rellax.ctr.runs import machine

COMPARISONS = (
    ("zero-shot-retrieved", "zero-shot-recent", "Retrieval without training"),
    ("lora-recent", "zero-shot-recent", "Training (LoRA on recent prompts)"),
    ("rella", "lora-recent", "Retrieval and the mixture"),
    ("rella-spa", "rella", "SPA on top of ReLLa"),
    ("rella-cflora", "rella", "CFLoRA on top of ReLLa"),
    ("rellax", "rella", "SPA and CFLoRA on top of ReLLa"),
    ("rellax", "din-shots", "ReLLaX against a DIN on the same shots"),
    ("rellax", "din", "ReLLaX against a DIN on all training samples"),
)


@dataclass(frozen=True)
class Variant:
    """One row: labels, probabilities and users (n,) of the shared test samples, and `metrics.evaluate`."""

    name: str
    title: str
    labels: np.ndarray
    probabilities: np.ndarray
    users: np.ndarray
    metrics: dict[str, Any]


def table(variants: Sequence[Variant]) -> str:
    """A Markdown table with 95 % intervals."""
    lines = ["| variant | AUC | LogLoss | ACC |", "|---|---|---|---|"]
    for variant in variants:
        cells = [_with_interval(variant.metrics, key) for key in ("auc", "log_loss", "acc")]
        lines.append(f"| {variant.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(
    folder: Path,
    variants: Sequence[Variant],
    config: dict[str, Any],
    data: dict[str, Any],
    times: dict[str, dict[str, float]],
) -> None:
    """Write report.md and auc.png to `folder`.

    Args:
        variants: rows of the table, on the same test samples.
        config: sizes of the demo.
        data: dataset.json.
        times: seconds and peak memory of each step.
    """
    _plot(folder / "auc.png", variants)
    sections = [
        _what(variants, config, data),
        table(variants),
        "![AUC by variant](auc.png)",
        "## Remarks\n\n" + "\n".join(f"- {remark}" for remark in remarks(variants, config)),
        _cost(times),
        _machine(config),
    ]
    with atomic_file(folder / "report.md") as part:
        part.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def remarks(variants: Sequence[Variant], config: dict[str, Any]) -> list[str]:
    """What the numbers say, and what they cannot say."""
    by_name = {variant.name: variant for variant in variants}
    sentences = [
        _compare(by_name[a], by_name[b], what) for a, b, what in COMPARISONS if a in by_name and b in by_name
    ]
    best = max(variants, key=lambda variant: variant.metrics["auc"] or 0.0)
    crm = "the same shots" if config["few_shot_crm"] else "all training samples"
    return [
        *sentences,
        f"Highest AUC here: {best.title}. With {best.metrics['samples']} test samples only differences whose "
        "interval excludes zero mean anything; each variant was trained once, with one seed.",
        f"{'Retrieval, SPA' if config['similarity'] == 'text+crm' else 'SPA'} and CFLoRA read a DIN that was "
        f"trained on {crm}: "
        + (
            "they know no more than the shots."
            if config["few_shot_crm"]
            else "through it they know more than the shots (`--few-shot-crm` changes that)."
        ),
        "The variants with SPA or CFLoRA continue from ReLLa's adapter, so they see the shots more often.",
    ]


def _compare(a: Variant, b: Variant, what: str) -> str:
    result = paired_bootstrap(a.labels, a.probabilities, b.probabilities, a.users)
    if result["difference"] is None:
        return f"{what}: no AUC, the test samples have one label."
    low, high = result["interval"]
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no clear difference"
    return f"{what}: AUC {result['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}."


def _what(variants: Sequence[Variant], config: dict[str, Any], data: dict[str, Any]) -> str:
    count = data["counts"]
    model = "SmolLM2-135M-Instruct" if config["model"] is None else Path(config["model"]).name
    count_recent = recent_behaviours(config["recent_share"], config["k"])
    recent = f" (of retrieved ones {count_recent} the most recent)" if count_recent else ""
    return (
        f"# {data['name']}: every variant on the same test samples\n\n"
        f"{count['users']:,} users, {count['items']:,} items, {count['samples']:,} samples, split 8:1:1 by "
        f"time; label: rating above {data['positive_above']:g}. {model}, {config['shots']:,} shots, "
        f"K = {config['k']} behaviours in a prompt{recent}, {variants[0].metrics['samples']:,} random test "
        f"samples, seed {config['seed']}. "
        "Model selection on the validation split alone. In brackets: 95 % bootstrap intervals, over users."
    )


def _cost(times: dict[str, dict[str, float]]) -> str:
    lines = ["## Time and memory", "", "| step | seconds |", "|---|---|"]
    lines += [f"| {title} | {step['seconds']:.0f} |" for title, step in times.items()]
    total = sum(step["seconds"] for step in times.values())
    peak = max(step["peak_gib"] for step in times.values())
    return "\n".join([*lines, f"| **all** | **{total:.0f}** |", "", f"Peak memory {peak:.1f} GiB."])


def _machine(config: dict[str, Any]) -> str:
    options = " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in config.items()
        if value is not None and value is not False
    )
    return f"## Environment\n\n{machine()}\n\n```\nrellax demo {options}\n```"


def _with_interval(metrics: dict[str, Any], key: str) -> str:
    value, interval = metrics[key], metrics[f"{key}_interval"]
    if value is None or interval is None:
        return "-" if value is None else f"{value:.3f}"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _plot(path: Path, variants: Sequence[Variant]) -> None:
    from matplotlib.figure import Figure

    drawn = [variant for variant in variants if variant.metrics["auc"] is not None][::-1]
    figure = Figure(figsize=(8, 0.4 * len(drawn) + 1), layout="constrained")
    axis = figure.subplots()
    for row, variant in enumerate(drawn):
        low, high = variant.metrics["auc_interval"]
        axis.plot([low, high], [row, row], color="0.6", linewidth=2)
        axis.plot(variant.metrics["auc"], row, "o", color="C0")
    axis.axvline(0.5, color="0.8", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(drawn)), [variant.title for variant in drawn])
    axis.set_xlabel("AUC on the test samples, 95 % interval")
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=120)
