"""A plugin of pytest (`-p benchmarks.gpu.pytest_log`) that writes records.

Of the tests of a file their counts and failures, written anew after each test; of a benchmark its times and
what it measured. A test that failed is a record, not the failure of the section.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

from .records import emit

_MISSING = re.compile(r"ModuleNotFoundError: No module named '(?!rellax)([\w.]+)'")
_STATISTICS = {"median": "median_s", "q1": "q1_s", "q3": "q3_s", "rounds": "rounds"}


class Log:
    """Of the process that sees all reports: with pytest-xdist the one that hands out the tests."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if report.when == "call" and report.passed and getattr(benchmark, "stats", None):
            measured = {new: getattr(benchmark.stats.stats, old) for old, new in _STATISTICS.items()}
            emit(report.nodeid.removeprefix("benchmarks/"), **measured, **benchmark.extra_info)
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, "failed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped or report.when == "call":
            self._add(report, report.outcome)

    def _add(self, report: pytest.TestReport | pytest.CollectReport, outcome: str) -> None:
        """A test that lacks another package of the machine's has not failed: it cannot run."""
        name = report.nodeid.partition("::")[0]
        file = self.files.setdefault(
            name, {"outcomes": Counter(), "missing": [], "skips": [], "failures": []}
        )
        if outcome == "failed":
            if missing := _MISSING.findall(report.longreprtext):
                outcome = "cannot run"
                file["missing"] = sorted({*file["missing"], *missing})
            else:
                file["failures"].append(f"{report.nodeid}: {_reason(report)}")
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            file["skips"] = sorted({*file["skips"], report.longrepr[2].removeprefix("Skipped: ")})
        file["outcomes"][outcome] += 1
        emit(name, **file)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longreprtext)[-400:]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Log())


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.OK
