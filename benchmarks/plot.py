"""Charts of measured results: `python -m benchmarks.plot FILE.json [FOLDER]`.

FILE is what `make gpu` wrote, or pytest-benchmark with --benchmark-json. Beside it, or in FOLDER, come, where
it has what they show:

    FILE-roofline.png   rates reached over operations per byte, under the machine's measured ceilings
    FILE-speedup.png    peers' times over ours
    FILE-sweep.png      overhead over the frozen layer, by tokens, rank and instances
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Records = dict[str, dict[str, Any]]

OURS = "rellax"
_OPERATORS = ("cflora", "gate_bank", "soft_prompt", "answer", "history_topk", "item_topk")
_COLOURS = dict(zip(_OPERATORS, plt.colormaps["tab10"].colors, strict=False))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH = 8.0  # inches; at 120 dots each about the width of a README


def main(file: Path, folder: Path) -> list[Path]:
    data = json.loads(file.read_text(encoding="utf-8"))
    records = _records(data)
    charts = {
        "roofline": roofline(records, _ceilings(data)),
        "speedup": speedup(records),
        "sweep": sweep(records),
    }
    written = []
    for name, figure in charts.items():
        if figure is not None:
            written.append(folder / f"{file.stem}-{name}.png")
            figure.savefig(written[-1], dpi=120, bbox_inches="tight")
            plt.close(figure)
    return written


def _records(data: Mapping[str, Any]) -> Records:
    """What was timed, by name: from either kind of file."""
    if "benchmarks" in data:
        return {
            entry["fullname"].rpartition("/")[2]: {
                "median_s": entry["stats"]["median"],
                **entry["extra_info"],
            }
            for entry in data["benchmarks"]
        }
    sections = (data["sections"].get(name, {}) for name in ("sweep", "benchmarks", "step"))
    return {name: record for section in sections for name, record in section.get("records", {}).items()}


def _ceilings(data: Mapping[str, Any]) -> tuple[float, float] | None:
    """Bytes and operations per second."""
    measured = data.get("sections", {}).get("machine", {}).get("records", {})
    if "copy" not in measured or "product bfloat16" not in measured:
        return None
    return measured["copy"]["bytes_per_s"], measured["product bfloat16"]["flops_per_s"]


def roofline(records: Records, ceilings: tuple[float, float] | None) -> Figure | None:
    """Of our own variants that say what they move and compute."""
    points = [
        (_operator(name), record["flops"] / record["bytes"], record["flops"] / seconds)
        for name, record in records.items()
        if record.get("flops") and record.get("bytes") and (seconds := _our_seconds(name, record))
    ]
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(_WIDTH, 4.5))
    if ceilings:
        _roof(axes, *ceilings, [intensity for _, intensity, _ in points])
    for operator in dict.fromkeys(operator for operator, _, _ in points):
        _, intensities, rates = zip(*(point for point in points if point[0] == operator), strict=True)
        colour = _COLOURS.get(operator, "black")
        axes.scatter(intensities, [r / 1e12 for r in rates], s=28, color=colour, label=operator, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    axes.set_title("What the operators reach", fontsize=11)
    return figure


def _roof(axes: Axes, bandwidth: float, peak: float, intensities: list[float]) -> None:
    """As measured: a large copy, and a large product in bf16."""
    ridge = peak / bandwidth
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    copy, product = f"copy, {bandwidth / 1e9:.3g} GB/s", f"bf16 product, {peak / 1e12:.3g} TFLOP/s"
    axes.plot([left, ridge], [left * bandwidth / 1e12, peak / 1e12], color="black", label=copy)
    axes.plot([ridge, right], [peak / 1e12] * 2, color="black", ls="--", label=product)


def speedup(records: Records) -> Figure | None:
    """A row for what was measured, a mark for each peer: how many times our time it takes."""
    groups = dict(_comparisons(records))
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(_WIDTH, 1.3 + 0.26 * len(groups)))
    for i, peer in enumerate(dict.fromkeys(peer for peers in groups.values() for peer in peers)):
        found = [(peers[peer], row) for row, peers in enumerate(groups.values()) if peer in peers]
        axes.plot(*zip(*found, strict=True), _MARKERS[i % len(_MARKERS)], ms=6, label=peer, zorder=3)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.set(xscale="log", xlabel="time over rellax's (right of 1: rellax is faster)")
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", lw=1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return figure


def _comparisons(records: Records) -> Iterator[tuple[str, dict[str, float]]]:
    """Times over ours, by what was measured; of a sweep the first size of each kind."""
    firsts: dict[str, str] = {}
    for name, record in records.items():
        if record.get("over_rellax") and firsts.setdefault(name.partition("=")[0], name) == name:
            yield name, record["over_rellax"]
    tests: dict[str, dict[str, float]] = {}
    for name, record in records.items():
        if (
            match := re.fullmatch(r"bench_(\w+)\.py::test_(\w+)\[(.+)\]", name)
        ) and "peak_bytes_of_all" not in record:
            *settings, variant = match[3].split("-")
            group = " ".join([match[2], *settings])
            if "ratio" in record:
                tests.setdefault(group, {})[variant] = record["ratio"]
            else:
                tests.setdefault(group, {})[f"={variant}"] = record.get("seconds_of_all", record["median_s"])
    for group, found in tests.items():
        ours = [seconds for variant, seconds in found.items() if variant.startswith(f"={OURS}")]
        peers = {
            variant.removeprefix("="): value / ours[0] if variant.startswith("=") else value
            for variant, value in found.items()
            if not variant.startswith(f"={OURS}") and (ours or not variant.startswith("="))
        }
        if peers:
            yield group, peers


def sweep(records: Records) -> Figure | None:
    """Overhead over the frozen layer by one size at a time; a line each for us and the peers."""
    pattern = re.compile(r"cflora (forward|both) T=(\d+) d=(\d+) r=(\d+) B=(\d+)")
    found: dict[str, list[tuple[dict[str, int], dict[str, float]]]] = {"forward": [], "both": []}
    for name, record in records.items():
        if match := pattern.fullmatch(name):
            sizes = dict(zip("TdrB", map(int, match.groups()[1:]), strict=True))
            found[match[1]].append((sizes, record["overhead"]))
    if not all(found.values()):
        return None
    titles = {"T": "tokens", "r": "rank", "B": "instances"}
    figure, grid = plt.subplots(2, 3, figsize=(_WIDTH, 5.2), sharey="row", squeeze=False)
    for row, (direction, points) in zip(grid, found.items(), strict=True):
        usual = points[0][0]
        for axes, (size, title) in zip(row, titles.items(), strict=True):
            line = [point for point in points if all(point[0][s] == usual[s] for s in "TdrB" if s != size)]
            line.sort(key=lambda point: point[0][size])
            for variant in dict.fromkeys(variant for _, over in line for variant in over):
                ys = [(sizes[size], 100 * over[variant]) for sizes, over in line if variant in over]
                style = {"color": "black", "lw": 2, "zorder": 3} if variant == OURS else {"lw": 1.2}
                axes.plot(*zip(*ys, strict=True), marker="o", ms=3, label=variant, **style)
            axes.set_xscale("log", base=2)
            axes.set_xticks([sizes[size] for sizes, _ in line], [str(sizes[size]) for sizes, _ in line])
            axes.tick_params(axis="x", labelsize=8, labelrotation=30)
            axes.set_yscale("symlog", linthresh=10)
            axes.yaxis.set_major_formatter("{x:g} %")
            axes.set_xlabel(title)
            axes.grid(alpha=0.3)
        row[0].set_ylabel({"forward": "forward", "both": "forward + backward"}[direction])
    handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), fontsize=9)
    usual = ", ".join(f"{name} = {value}" for name, value in found["forward"][0][0].items())
    figure.suptitle(f"Overhead over the frozen layer; what is not varied has {usual}", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _operator(name: str) -> str:
    return next((operator for operator in _OPERATORS if operator in name), name)


def _our_seconds(name: str, record: Mapping[str, Any]) -> float | None:
    """None for a peer's record."""
    if "seconds" in record:
        return record["seconds"].get(OURS)
    if "rellax_ms" in record:
        return record["rellax_ms"] / 1e3
    return record.get("median_s") if OURS in name else None


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for chart in main(path, Path(sys.argv[2]) if len(sys.argv) > 2 else path.parent):
        print(chart)
