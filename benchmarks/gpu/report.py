"""The results as one page of Markdown: a verdict for each bar first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .bars import BARS, Bar

Results = Mapping[str, Any]


def report(results: Results) -> str:
    parts = (_head, _verdicts, _sections, _failures, _ceilings, _sweep, _benchmarks, _tuning)
    return "\n\n".join(filter(None, ("\n".join(part(results)) for part in parts))) + "\n"


def failures(results: Results) -> list[tuple[str, str]]:
    """Section and sentence of everything that went wrong."""
    found = []
    for name, section in results["sections"].items():
        if section["status"] == "failed":
            found.append((name, section["reason"]))
        for record in section["records"].values():
            found += [(name, failure) for failure in record.get("failures", ())]
    return found


def wrong(results: Results) -> bool:
    return bool(failures(results))


def _head(results: Results) -> Iterator[str]:
    yield f"# {results['machine']}"
    yield ""
    yield f"`{results['command']}` at {results['commit']}, {results['started']}. The JSON beside this page"
    yield "has all figures. Times are medians; each peer ran in the same process on the same inputs."
    packages = results["sections"].get("machine", {}).get("records", {}).get("packages", {})
    there = [f"{name} {version}" for name, version in packages.items() if version != "absent"]
    absent = [name for name, version in packages.items() if version == "absent"]
    if packages:
        yield ""
        yield f"With {', '.join(there)}. Absent: {', '.join(absent) or 'none'}."


def _verdicts(results: Results) -> Iterator[str]:
    yield "## Bars"
    yield ""
    yield "They were set for an NVIDIA H200."
    yield ""
    yield from _table(("bar", "wanted", "measured", "verdict"), (_row(bar, results) for bar in BARS))


def _row(bar: Bar, results: Results) -> tuple[str, ...]:
    at = {"<=": "≤", ">=": "≥"}[bar.at]
    if results["dry"]:
        verdict, value = "not measured: a dry run", None
    else:
        verdict, value = bar.judge(results["sections"])
    wanted = f"{at} {_figure(bar.threshold, bar.unit)}"
    return bar.title, wanted, "" if value is None else _figure(value, bar.unit), verdict


def _figure(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3g} {unit}"


def _sections(results: Results) -> Iterator[str]:
    yield "## Sections"
    yield ""
    rows = [
        (
            section["title"],
            section["status"],
            section.get("commit", ""),
            f"{section['seconds']:.0f} s",
            _counted(section),
        )
        for section in results["sections"].values()
    ]
    yield from _table(("section", "", "commit", "took", "found"), rows)


def _counted(section: Mapping[str, Any]) -> str:
    """What its records add up to, or why there are none."""
    if section["status"] == "skipped":
        return _one_line(section["reason"])
    counts: dict[str, int] = {}
    for record in section["records"].values():
        single = {key: record[key] for key in ("passed", "reported") if key in record}
        for key, count in {**single, **record.get("outcomes", {})}.items():
            counts[key] = counts.get(key, 0) + count
    words = [f"{count} {key}" for key, count in counts.items()] or [f"{len(section['records'])} records"]
    if missing := {
        package for record in section["records"].values() for package in record.get("missing", ())
    }:
        words.append(f"for want of {', '.join(sorted(missing))}")
    words += [
        f"{name}: {record['skipped']}" for name, record in section["records"].items() if "skipped" in record
    ]
    reasons = {reason for record in section["records"].values() for reason in record.get("skips", ())}
    words += sorted(reasons) + [section["reason"]] * (section["status"] == "stopped")
    return _one_line(", ".join(words))


def _failures(results: Results) -> Iterator[str]:
    found = failures(results)
    if found:
        yield "## What went wrong"
        yield ""
        yield from (f"- {section}: {_one_line(failure)}" for section, failure in found)


def _ceilings(results: Results) -> Iterator[str]:
    records = _records(results, "machine")
    rows = [
        (name, f"{record['bytes_per_s'] / 1e9:.3g} GB/s")
        for name, record in records
        if "bytes_per_s" in record
    ]
    rows += [
        (name, f"{record['flops_per_s'] / 1e12:.3g} TFLOP/s")
        for name, record in records
        if "flops_per_s" in record
    ]
    if rows:
        yield "## Ceilings"
        yield ""
        yield from _table(("", "measured"), rows)


def _sweep(results: Results) -> Iterator[str]:
    """Each size: our time and rates, in parts of the ceilings, and how much longer each peer took."""
    ceilings = dict(_records(results, "machine"))
    copy = ceilings.get("copy", {}).get("bytes_per_s")
    product = ceilings.get("product bfloat16", {}).get("flops_per_s")
    rows = []
    for name, record in _records(results, "sweep"):
        if "over_rellax" not in record:
            continue
        peers = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in record["over_rellax"].items())
        peers += "".join(f", {peer} failed" for peer in record.get("failed", ()))
        overhead = record.get("overhead", {}).get("rellax")
        eager, ours = record.get("eager_s"), record["seconds"]["rellax"]
        rows.append(
            (
                name,
                _milliseconds(ours) if eager else "",
                _milliseconds(eager["rellax"] if eager else ours),
                "" if overhead is None else f"{100 * overhead:+.1f} %",
                _rate(record["bytes_per_s"], copy, 1e9),
                _rate(record["flops_per_s"], product, 1e12),
                peers,
            )
        )
    if rows:
        yield "## Sizes"
        yield ""
        yield (
            "The GPU's own time, of a CUDA graph; eager: with the host's launches, as users meet it. "
            "Where the first is missing, what follows is of the second. "
            "Peers: their time over ours. Overhead: over the frozen layers alone."
        )
        yield ""
        head = ("", "ms", "eager", "overhead", "GB/s (of the copy)", "TFLOP/s (of the product)", "peers")
        yield from _table(head, rows)


def _benchmarks(results: Results) -> Iterator[str]:
    rows = []
    for section in ("benchmarks", "step"):
        for name, record in _records(results, section):
            if "median_s" in record:
                standard = ("median_s", "q1_s", "q3_s", "rounds", "bytes", "flops")
                others = {key: value for key, value in record.items() if key not in standard}
                words = [
                    f"{key} {value:.4g}" for key, value in others.items() if isinstance(value, (int, float))
                ]
                rows.append((name, _milliseconds(record["median_s"]), ", ".join(words)))
    if rows:
        yield "## Benchmarks"
        yield ""
        yield from _table(("", "ms", "measured with it"), rows)


def _tuning(results: Results) -> Iterator[str]:
    """Both measurements of the present configuration, before and after the others: what is less is noise."""
    rows = [
        (
            name,
            record["present"],
            " and ".join(map(_milliseconds, record["present_s"])),
            record["fastest"],
            _milliseconds(record["fastest_s"]) if record["fastest_s"] else "",
            str(len(record["refused"])),
        )
        for name, record in _records(results, "tune")
    ]
    if rows:
        yield "## Configurations"
        yield ""
        yield "Of a kernel's table in rellax/kernels: the whole operator's time with one row of it changed."
        yield ""
        yield from _table(("", "present", "ms", "fastest of the others", "ms", "refused"), rows)


def _records(results: Results, section: str) -> list[tuple[str, Mapping[str, Any]]]:
    return list(results["sections"].get(section, {}).get("records", {}).items())


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def _rate(rate: float, ceiling: float | None, unit: float) -> str:
    if not rate:
        return ""
    return f"{rate / unit:.3g}" + (f" ({100 * rate / ceiling:.0f} %)" if ceiling else "")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = tuple(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:400]
