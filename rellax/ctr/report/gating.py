"""The section on gates: what they add to plain LoRA, in which layers, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np

from rellax.ctr.report.charts import Axis, Plot, figure, heat_maps, heat_scale, legend, rank, series
from rellax.ctr.report.gates import Gates, Segments, chosen, explained_by, gates, segments
from rellax.ctr.report.html import Child, details, node, table
from rellax.ctr.report.material import Material, Run
from rellax.ctr.report.words import bold, code, note, percent, says
from rellax.errors import InputError


def by_segment(material: Material) -> list[Element]:
    """A part for each run with gates."""
    gated = [run for run in material.runs if run.kind == "train" and run.is_gated]
    if not gated:
        command = "rellax train rellax --stage 2 --from RUN --interaction full"
        return [says(["None of these runs has gates."]), note(code(command), " trains a run that has.")]
    return [element for run in gated for element in _run(material, run)]


def _run(material: Material, run: Run) -> list[Element]:
    samples = chosen(material, run)
    try:
        found = gates(material, run, samples)
    except InputError as error:
        return [note(f"{run.name}: {error}.")]
    prediction = None
    if run.scores is not None:
        prediction = run.scores.probability[np.searchsorted(run.scores.sample, samples)]
    parts = segments(material, samples, prediction)
    shares = [explained_by(found, part, material.seed) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: -(shares[i][0] - shares[i][1]))
    parts, shares = [parts[i] for i in order], [shares[i] for i in order]
    # Beside what tells the gates apart best, activity: what one would ask about first.
    shown = list({part.title: part for part in (*parts[:2], *_titled(parts, "earlier behaviours"))}.values())
    cards = [_layers(run, found), *(_scatter(found, part) for part in shown), *_heat(run, found)]
    return [
        says(_sentence(run, found, parts, shares)),
        node("div", cards, class_="grid"),
        details("How far the gates of segments are apart", _shares(run, parts, shares)),
        details("Distance from plain LoRA by segment", _distances(run, found, parts)),
    ]


def _titled(parts: Sequence[Segments], title: str) -> list[Segments]:
    return [part for part in parts if part.title == title]


def _sentence(
    run: Run, found: Gates, parts: Sequence[Segments], shares: Sequence[tuple[float, float]]
) -> list[Child]:
    personal = float(np.square(found.personal).mean())
    whole = personal + float(np.square(found.shared).mean())
    sentence: list[Child] = [
        "The gates of ",
        bold(run.name),
        f" are {whole**0.5:.2f} of the identity's norm away from the identity, which is plain LoRA; "
        f"{percent(personal / (whole or 1.0))} of that (squared) differs from sample to sample",
    ]
    telling = [
        (part.title, share) for part, (share, chance) in zip(parts, shares, strict=True) if share > chance
    ]
    if not telling:
        return [*sentence, "; none of the segments tells them apart better than chance."]
    title, share = telling[0]
    return [*sentence, "; most of that follows " if share > 0.5 else "; what tells them apart best is ",
            bold(title), f" ({percent(share)} of the variance)."]  # fmt: skip


def _layers(run: Run, found: Gates) -> Element:
    layers = [layer for layer, _ in found.projections]
    values = np.concatenate([found.shared, found.personal])
    x = Axis.counting("layer", min(layers), max(layers))
    plot = Plot(
        f"Gates of {run.name} by layer", x, Axis.over("distance, 1 is the identity's norm", [*values, 0.0])
    )
    entries = []
    for place, kind in enumerate(found.kinds):
        rows, at = found.of_kind(kind)
        plot.line(at, found.shared[rows].tolist(), f"{series(place)} after")
        plot.line(at, found.personal[rows].tolist(), series(place))
        entries += [
            (series(place), f"{kind}, from sample to sample"),
            (f"{series(place)} after", f"{kind}, for all"),
        ]
    return figure("Change of the gates by layer", plot.svg, legend(entries))


def _scatter(found: Gates, part: Segments) -> Element:
    points = found.components[:, :2]
    if points.shape[1] < 2:
        points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    share = np.pad(found.explained, (0, 2))[:2]
    x = _bare(Axis.over(f"first component, {percent(share[0])} of the variance", points[:, 0]))
    y = _bare(Axis.over(f"second component, {percent(share[1])}", points[:, 1]))
    plot = Plot(f"Two principal components of the gates, by {part.title}", x, y, height=300)
    order = np.random.default_rng(0).permutation(len(part.names))
    for code_ in order:  # no segment always lies on top
        rows = part.code == code_
        plot.dots(points[rows, 0].tolist(), points[rows, 1].tolist(), _class(part, int(code_)))
    names = legend(((_class(part, place), name) for place, name in enumerate(part.names)), dots=True)
    return figure(f"Samples' gates by {part.title}", plot.svg, names)


def _class(part: Segments, place: int) -> str:
    return rank(place, len(part.names)) if part.ordered else series(place)


def _bare(axis: Axis) -> Axis:
    """Without numbers: the components have no unit."""
    return Axis(axis.label, axis.low, axis.high, ())


def _heat(run: Run, found: Gates) -> list[Element]:
    scale = float(np.quantile(np.abs(found.mean), 0.99)) or 1.0
    cards = []
    for kind in found.kinds:
        rows, layers = found.of_kind(kind)
        names = [f"layer {layer}" for layer in layers]
        alt = f"Mean gate of {run.name} minus the identity, {kind}, a matrix for each layer"
        maps = heat_maps(alt, found.mean[rows], names, scale)
        cards.append(figure(f"Mean gate minus identity, {kind}", maps, heat_scale(scale)))
    return cards


def _shares(run: Run, parts: Sequence[Segments], shares: Sequence[tuple[float, float]]) -> Element:
    rows = [
        [part.title, str(len(part.names)), percent(share, 1), percent(chance, 1)]
        for part, (share, chance) in zip(parts, shares, strict=True)
    ]
    caption = f"Share of the variance of the gates of {run.name} that lies between segments"
    return table(caption, ["segments by", "segments", "share", "95 % of random ones stay below"], rows)


def _distances(run: Run, found: Gates, parts: Sequence[Segments]) -> Element:
    rows: list[list[Child]] = []
    for part in parts:
        for place, name in enumerate(part.names):
            values = found.distance[part.code == place]
            half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            shown = f"{values.mean():.3f} ± {half:.3f}" if np.isfinite(half) else f"{values.mean():.3f}"
            rows.append([f"{part.title}: {name}", f"{len(values):,}", shown])
    caption = f"Frobenius distance of the gates of {run.name} from the identity, in units of its norm, ± 95 %"
    return table(caption, ["segment", "samples", "mean distance"], rows)
