"""Sections run one after another, each in processes of its own: none can take another down with it.

A section's processes write records (`records.py`). They are copied into the results file as they come, and
that file is whole at any time: whatever stops the run, nothing found before is lost.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rellax._files import write_json

from . import records

ROOT = Path(__file__).parents[2]
_POLL = 0.5  # seconds between two looks at the records
_ERROR_LINES = 12


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Attributes:
        name: its key in the results.
        title: what it is for, for people.
        commands: arguments of this Python, one command after another; none is a section with nothing to do.
        seconds: its share of the budget. What a section leaves over is the next ones'.
        least: seconds without which it is not started.
        needs: Python packages without which it cannot run.
        nothing: the reason to give where there is no command.
        variables: of the environment, for this section alone.
    """

    name: str
    title: str
    commands: Sequence[Sequence[str]]
    seconds: float
    least: float = 5.0
    needs: Sequence[str] = ()
    nothing: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    def why_not(self) -> str:
        missing = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"not installed: {', '.join(missing)}" if missing else "" if self.commands else self.nothing


def run_sections(
    sections: Sequence[Section],
    results: dict[str, Any],
    path: Path,
    budget: float,
    environment: Mapping[str, str],
    on_change: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Run them all within `budget` seconds; `results`, with ``results["sections"]``, is kept at `path`."""
    logs = Path(tempfile.mkdtemp(prefix="rellax-gpu-"))
    print(f"what the sections print: {logs}", flush=True)
    end = time.monotonic() + budget
    for i, section in enumerate(sections):
        left = end - time.monotonic()
        limit = left * section.seconds / sum(later.seconds for later in sections[i:])
        found = {"title": section.title, "status": "unfinished", "reason": "", "seconds": 0.0, "records": {}}
        found["commit"] = results.get("commit", "")
        results["sections"][section.name] = found
        reason = section.why_not()
        if not reason and limit < section.least:
            reason = f"{max(limit, 0):.0f} s were left for it, it needs {section.least:.0f} s"
        if reason:
            found |= {"status": "skipped", "reason": reason}
            write_json(path, results)
        else:
            for _ in _run(section, found, limit, logs, environment):
                write_json(path, results)
        on_change(results)
        print(
            f"{section.name:12} {found['status']:8} {found['seconds']:6.1f} s  {found['reason']}", flush=True
        )


def _run(
    section: Section, found: dict[str, Any], limit: float, logs: Path, environment: Mapping[str, str]
) -> Iterator[None]:
    """Fill `found` with what the section's processes find; yields after each change.

    Each command has a third of the time left, the last ones more: one that hangs costs no more.
    """
    start = time.monotonic()
    lines, log = logs / f"{section.name}.jsonl", logs / f"{section.name}.log"
    environment = {**environment, **section.variables, records.FILE: str(lines)}
    stopped: list[str] = []
    failed: list[str] = []
    with log.open("w", encoding="utf-8") as output:
        for i, command in enumerate(section.commands):
            now = time.monotonic()
            end = now + (start + limit - now) / min(len(section.commands) - i, 3)
            with _group([sys.executable, *command], environment, output) as process:
                while process.poll() is None and time.monotonic() < end:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL)
                    found |= {"seconds": time.monotonic() - start, "records": records.read(lines)}
                    yield
                running = process.poll() is None
            if running:
                stopped.append(f"{command[-1]}: its {end - now:.0f} s were over")
            elif process.returncode:
                failed.append(f"{command[-1]}: {_end(process.returncode, log)}")
    found |= {"seconds": round(time.monotonic() - start, 1), "records": records.read(lines)}
    if skipped := found["records"].pop("skipped", None):
        found |= {"status": "skipped", **skipped}
    else:
        status = "failed" if failed else "stopped" if stopped else "done"
        found |= {"status": status, "reason": "; ".join(failed + stopped)}
    yield


@contextlib.contextmanager
def _group(
    command: Sequence[str], environment: Mapping[str, str], output: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends, with all that it started, when the block does."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(returncode: int, log: Path) -> str:
    how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([how, *lines[-_ERROR_LINES:]])
