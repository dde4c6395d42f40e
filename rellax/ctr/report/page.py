"""The page of `rellax report`: one self-contained HTML file about one or more runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from tqdm import tqdm

from rellax._files import atomic_file
from rellax.ctr.report import behaviours, gating, quality, training
from rellax.ctr.report.html import document, node
from rellax.ctr.report.material import Material, gather

_STYLE = Path(__file__).with_name("page.css")
_SECTIONS: tuple[tuple[str, str, Callable[[Material], list[Element]]], ...] = (
    ("metrics", "Metrics", quality.metrics),
    ("roc", "ROC", quality.roc),
    ("calibration", "Calibration", quality.calibration),
    ("training", "Training", training.curves),
    ("history", "History length", quality.by_history),
    ("retrieval", "Retrieved behaviours", behaviours.examples),
    ("gates", "Gates", gating.by_segment),
    ("runs", "Runs", training.settings),
)


def report(
    work: str | Path,
    runs: Sequence[str],
    out: str | Path,
    *,
    split: str = "test",
    baseline: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write a page about `runs`, folders in `work` of `rellax train`, `crm` or `evaluate --zero-shot`.

    The page fetches nothing, runs no script, and is the same, byte for byte, for the same folders. A part
    whose files are missing names the command that makes them.

    Args:
        split: whose predictions are looked at.
        baseline: the run that others are compared with; None is the first one.
        seed: of resamplings, of the samples that are shown, and of those whose gates are looked at.

    Raises:
        InputError: a folder holds no run, or predictions of other data.
    """
    steps = tqdm(total=len(_SECTIONS) + 1, desc="report", unit="part", delay=2, disable=not progress)
    with steps:
        material = gather(Path(work), runs, split=split, baseline=baseline, seed=seed)
        steps.update()
        sections = []
        for key, title, make in _SECTIONS:
            heading = node("h2", title, id=f"{key}-title")
            sections.append(node("section", heading, make(material), id=key, aria_labelledby=f"{key}-title"))
            steps.update()
    title = f"{material.dataset.meta['name']}: {', '.join(runs)}"
    links = [node("li", node("a", name, href=f"#{key}")) for key, name, _ in _SECTIONS]
    page = document(
        title,
        _STYLE.read_text(encoding="utf-8"),
        node("header", node("h1", title), node("p", _about(material))),
        node("nav", node("ul", links), aria_label="Sections"),
        node("main", sections),
        node("footer", node("p", "Made by ", node("code", _command(material)), ".")),
    )
    with atomic_file(out) as part:
        part.write_bytes(page)


def _about(material: Material) -> str:
    data = material.dataset.meta
    count = data["counts"]
    noun = data["item_noun"]
    label = "the label" if data["answers"] is not None else f"a rating above {data['positive_above']:g}"
    return (
        f"{count['users']:,} users, {count['items']:,} {noun} items, {count['samples']:,} samples. "
        f"“Yes” is {label}. What follows is about the {material.split} split; "
        "numbers in brackets are 95 % bootstrap intervals, over users."
    )


def _command(material: Material) -> str:
    options = [f"--work {material.work}"]
    if material.split != "test":
        options.append(f"--split {material.split}")
    if material.baseline is not None and material.baseline is not material.runs[0]:
        options.append(f"--baseline {material.baseline.name}")
    if material.seed:
        options.append(f"--seed {material.seed}")
    return " ".join(["rellax report", *(run.name for run in material.runs), *options])
