"""What the sections share: how numbers are written, and what is said where something is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from rellax.ctr.report.html import Child, node
from rellax.ctr.report.material import Material, Run


def says(sentence: Iterable[Child]) -> Element:
    """The one sentence on what a section shows."""
    return node("p", sentence, class_="says")


def bold(text: str) -> Element:
    return node("b", text)


def code(text: str) -> Element:
    return node("code", text)


NONE = "\N{EN DASH}"


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def with_interval(value: float | None, interval: Sequence[float] | None) -> Element:
    if value is None or interval is None:
        return node("span", number(value), class_="num")
    return node(
        "span", f"{value:.3f} ", node("small", f"[{interval[0]:.3f}, {interval[1]:.3f}]"), class_="num"
    )


def whiskers(
    value: float | None, interval: Sequence[float] | None, low: float, high: float, class_: str
) -> Element:
    """A value and its interval on a line from `low` to `high`, as wide as its cell; 0.5 is marked."""

    def at(point: float) -> float:
        return 100 * (point - low) / (high - low or 1.0)

    parts = []
    if low <= 0.5 <= high:
        parts.append(node("i", class_="chance", style=f"left:{at(0.5):.1f}%"))
    if value is not None and interval is not None:
        left, right = at(interval[0]), at(interval[1])
        parts.append(node("i", class_=f"range {class_}", style=f"left:{left:.1f}%;width:{right - left:.1f}%"))
        parts.append(node("i", class_=f"point {class_}", style=f"left:{at(value):.1f}%"))
    return node("div", parts, class_="whiskers", aria_hidden="true")


def nothing(material: Material) -> list[Element]:
    """Where no run was scored."""
    return [says(["No run has predictions on this split."]), *missing(material)]


def missing(material: Material) -> list[Element]:
    """How to score what was not scored."""
    return [
        note(f"{run.name} has no predictions on the {material.split} split: ", *scoring(material, run))
        for run in material.unscored
    ]


def note(*parts: Child) -> Element:
    return node("p", parts, class_="missing")


def scoring(material: Material, run: Run) -> list[Child]:
    """The command that scores a run, as the end of a sentence."""
    if run.kind == "crm":
        return [code(f"rellax crm {run.name} --redo --work {material.work}"), " makes them."]
    zero = " --zero-shot" if run.kind == "zero-shot" else ""
    command = f"rellax evaluate {run.name}{zero} --split {material.split} --work {material.work}"
    return [code(command), " makes them."]
