"""Charts as inline SVG. Colours are classes of the page's style, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

import numpy as np

from rellax.ctr.report.html import Child, node

WIDTH, HEIGHT = 380, 250
COLOURS = 8
RANKS = 4
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 30, 40
_LEVELS = 5  # of a heat map's colour, in either direction


@dataclass(frozen=True)
class Axis:
    """A linear axis; `ticks` are values with what stands beside them."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, pad: float = 0.05) -> Axis:
        """An axis over all finite values, with round ticks."""
        found = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(found), max(found)
        room = (high - low) * pad or abs(high) * pad or 1.0
        return cls.between(label, low - room, high + room)

    @classmethod
    def between(cls, label: str, low: float, high: float) -> Axis:
        step = _round_step((high - low) / 5)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        values = [number * step for number in range(first, last + 1)]
        return cls(label, low, high, tuple((value, f"{value + 0.0:,.{digits}f}") for value in values))

    @classmethod
    def counting(cls, label: str, first: int, last: int) -> Axis:
        """An axis of whole numbers."""
        axis = cls.between(label, first, max(last, first + 1))
        ticks = tuple((value, f"{value:,.0f}") for value, _ in axis.ticks if abs(value - round(value)) < 1e-9)
        return cls(label, axis.low, axis.high, ticks)

    @classmethod
    def of_names(cls, label: str, names: Sequence[str]) -> Axis:
        """A place for each name: 0, 1, …"""
        return cls(label, -0.5, len(names) - 0.5, tuple(enumerate(names)))


SHARE = Axis("", 0.0, 1.0, tuple((tick / 4, f"{tick / 4:g}") for tick in range(5)))


class Plot:
    """Axes on which lines, dots and whiskers are drawn, in the order of the calls.

    Args:
        alt: what one sees, for those who cannot.
        x, y: the axes.
    """

    def __init__(self, alt: str, x: Axis, y: Axis, *, height: int = HEIGHT) -> None:
        self.x, self.y, self.height = x, y, height
        self.svg = node("svg", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=alt, class_="plot")
        bottom = height - _BOTTOM
        for value, label in y.ticks:
            at = self._y(value)
            self._add("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_n(at), y2=_n(at), class_="grid")
            self._text(_LEFT - 6, at + 4, label, "end")
        for value, label in x.ticks:
            self._text(self._x(value), bottom + 16, label, "middle")
        self._add("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis")
        self._text(4, 11, y.label, "start", "label")
        self._text(WIDTH - _RIGHT, height - 6, x.label, "end", "label")

    def line(self, xs: Sequence[float], ys: Sequence[float], class_: str) -> None:
        """A line through the points; where a value is not finite it is interrupted."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                path.append(f"{pen}{_n(self._x(x))} {_n(self._y(y))}")
                pen = "L"
            else:
                pen = "M"
        self._add("path", d="".join(path), class_=f"line {class_}")

    def dot(self, x: float, y: float, class_: str, *, radius: float = 3.5, title: str | None = None) -> None:
        text = None if title is None else node("title", title)
        self._add("circle", text, cx=_n(self._x(x)), cy=_n(self._y(y)), r=_n(radius), class_=f"dot {class_}")

    def dots(self, xs: Sequence[float], ys: Sequence[float], class_: str, *, radius: float = 2.2) -> None:
        """Many small dots as one path, which takes less room than an element each."""
        path = "".join(f"M{_n(self._x(x))} {_n(self._y(y))}h0" for x, y in zip(xs, ys, strict=True))
        self._add("path", d=path, class_=f"dots {class_}", stroke_width=_n(2 * radius))

    def whisker(self, x: float, interval: Sequence[float], class_: str) -> None:
        at, (low, high) = _n(self._x(x)), interval
        self._add("line", x1=at, x2=at, y1=_n(self._y(low)), y2=_n(self._y(high)), class_=f"whisker {class_}")

    def bar(self, low: float, high: float, height: float, class_: str, title: str) -> None:
        """A bar from the x-axis, its height in parts of the y-axis' whole."""
        left, right = self._x(low) + 1, self._x(high) - 1
        tall = height * (self.height - _TOP - _BOTTOM)
        self._add(
            "rect",
            node("title", title),
            x=_n(left),
            y=_n(self.height - _BOTTOM - tall),
            width=_n(right - left),
            height=_n(tall),
            class_=class_,
        )

    def mark(self, x: float, label: str) -> None:
        """A vertical line with a label."""
        at = self._x(x)
        self._add("line", x1=_n(at), x2=_n(at), y1=_TOP, y2=self.height - _BOTTOM, class_="mark")
        left = at > (WIDTH + _LEFT) / 2
        self._text(at, _TOP - 4, label, "end" if left else "start", "label")

    def _x(self, value: float) -> float:
        return _LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (WIDTH - _RIGHT - _LEFT)

    def _y(self, value: float) -> float:
        share = (value - self.y.low) / (self.y.high - self.y.low)
        return self.height - _BOTTOM - min(max(share, -0.02), 1.02) * (self.height - _TOP - _BOTTOM)

    def _add(self, tag: str, *children: Child, **attributes: object) -> None:
        self.svg.append(node(tag, *children, **attributes))

    def _text(self, x: float, y: float, text: str, anchor: str, class_: str = "tick") -> None:
        self._add("text", text, x=_n(x), y=_n(y), text_anchor=anchor, class_=class_)


def heat_maps(alt: str, maps: np.ndarray, names: Sequence[str], scale: float, *, columns: int = 6) -> Element:
    """Matrices (n, r, r) as small multiples; full colour at `scale`, red above zero, blue below."""
    n, r, _ = maps.shape
    cell, gap, label = 48 / r, 12, 14
    rows = -(-n // columns)
    width, height = columns * (48 + gap), rows * (48 + gap + label)
    svg = node("svg", viewBox=f"0 0 {width} {height}", role="img", aria_label=alt, class_="heat")
    for index, (matrix, name) in enumerate(zip(maps, names, strict=True)):
        left, top = index % columns * (48 + gap) + gap / 2, index // columns * (48 + gap + label) + label
        svg.append(node("text", name, x=_n(left), y=_n(top - 4), class_="tick"))
        svg.append(node("rect", x=_n(left), y=_n(top), width=48, height=48, class_="frame"))
        for level in range(-_LEVELS, _LEVELS + 1):
            cells = np.argwhere(_level(matrix, scale) == level)
            if level and len(cells):
                side = _n(cell)
                path = "".join(
                    f"M{_n(left + j * cell)} {_n(top + i * cell)}h{side}v{side}h-{side}z" for i, j in cells
                )
                svg.append(node("path", d=path, class_=f"{'hot' if level > 0 else 'cold'} l{abs(level)}"))
    return svg


def heat_scale(scale: float) -> Element:
    """What the colours of `heat_maps` stand for."""
    steps = [
        node("span", class_=f"swatch {'hot' if level > 0 else 'cold'} l{abs(level)}")
        for level in range(-_LEVELS, _LEVELS + 1)
    ]
    return node("p", f"-{scale:.2g}", steps, f"+{scale:.2g}", class_="legend")


def legend(entries: Iterable[tuple[str, str]], *, dots: bool = False) -> Element:
    """Names with the colour class of each."""
    items = [node("li", swatch(class_, dot=dots), " ", name) for class_, name in entries]
    return node("ul", items, class_="legend")


def swatch(class_: str, *, dot: bool = False) -> Element:
    """A short piece of a series' line, or its dot."""
    line = node("line", x1=1, x2=21, y1=5, y2=5, class_=f"line {class_}")
    circle = node("circle", cx=16, cy=5, r=4, class_=f"dot {class_}")
    return node("svg", circle if dot else line, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")


def series(index: int) -> str:
    """The class of the index-th series: eight colours, then the same ones dashed, dotted …"""
    return f"s{index % COLOURS} d{index // COLOURS % 3}"


def rank(index: int, count: int) -> str:
    """The class of the index-th of `count` segments in an order: from pale to strong."""
    return f"o{round(index * (RANKS - 1) / max(1, count - 1))}"


def figure(title: str, picture: Element | Iterable[Element], *notes: Child) -> Element:
    """A card: a picture under its title, with notes below."""
    return node("figure", node("figcaption", title), picture, *notes)


def _level(matrix: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(np.clip(matrix / (scale or 1.0), -1, 1) * _LEVELS).astype(int)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _n(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
