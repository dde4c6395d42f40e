"""What benchmarks share: below their times stands what else they measured, and a dry run (RELLAX_DRY=1) shows
only that they run, with small sizes and few of their settings.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import pytest
from sizes import DRY, dry

_INDENT = "    "


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep, of each benchmark, as few settings as show each value of each parameter at least once."""
    if not DRY:
        return
    seen, kept, rest = set(), [], []
    for item in items:
        if getattr(item.module, "dry", None) is not dry:
            item.add_marker(pytest.mark.skip(reason="it has no sizes for a dry run"))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        values = {(item.function, name, repr(value)) for name, value in {"": None, **parameters}.items()}
        (rest if values <= seen else kept).append(item)
        seen |= values
    items[:] = kept
    config.hook.pytest_deselected(items=rest)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "call" and benchmark is not None:
        report.user_properties.extend(_flat(benchmark.extra_info))
    return report


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Ratios to peers, rates, bytes and FLOPs: pytest-benchmark shows them in its JSON alone."""
    measured = [report for report in terminalreporter.getreports("passed") if report.user_properties]
    if measured:
        terminalreporter.section("measured beside these times")
    for report in measured:
        terminalreporter.line(report.nodeid.rpartition("::")[2])
        values = [f"{name}\N{NO-BREAK SPACE}{_shown(value)}" for name, value in report.user_properties]
        for line in textwrap.wrap(", ".join(values), shutil.get_terminal_size().columns - len(_INDENT)):
            terminalreporter.line(_INDENT + line)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
