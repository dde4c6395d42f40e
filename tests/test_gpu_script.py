"""`make gpu` without a GPU: its dry run, what becomes of sections that go wrong, verdicts and charts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import correctness, report, sanitizer, sweep
from benchmarks.gpu.__main__ import PYTEST, main
from benchmarks.gpu.bars import BARS, Bar, Source
from benchmarks.gpu.sections import Section, run_sections
from benchmarks.plot import main as plot
from rellax.kernels import _tuning
from rellax.kernels._tuning import Tuned

ROOT = Path(__file__).parent.parent
NAMES = ["machine", "correctness", "sweep", "tests", "sanitizer", "benchmarks", "step", "tune"]
EMIT = "from benchmarks.gpu.records import emit; "


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make gpu DRY=1` wrote to, with this Python in place of a virtual environment."""
    out = tmp_path_factory.mktemp("gpu")
    # A section that has not enough of the budget is stopped: it has plenty, however slow or busy the machine.
    command = ["make", "gpu", "DRY=1", f"OUT={out}", "BUDGET=3600", f"PYTHON={sys.executable}", "VENV=none"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RELLAX_", "PYTEST_"))
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def results(dry_run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((dry_run / "dry-run.json").read_text(encoding="utf-8"))
    return found


def test_every_section_runs_or_says_why_not(results: dict[str, Any]) -> None:
    assert list(results["sections"]) == NAMES
    for section in results["sections"].values():
        assert section["status"] in ("done", "skipped")
        assert bool(section["reason"]) == (section["status"] == "skipped")
    assert {name for name in NAMES if results["sections"][name]["status"] == "done"} >= {
        "machine",
        "correctness",
        "sweep",
        "tests",
        "benchmarks",
        "tune",
    }
    assert report.failures(results) == []


def test_every_operator_is_checked_and_timed(results: dict[str, Any]) -> None:
    checked = results["sections"]["correctness"]["records"]
    assert len(checked) == 8
    for record in checked.values():
        assert record.get("passed") == 1 or "no Triton kernel" in record["skipped"]
    timed = {name.split()[0] for name in results["sections"]["sweep"]["records"]}
    assert timed == {"cflora", "gate_bank", "history_topk", "item_topk", "soft_prompt"}
    measured = results["sections"]["benchmarks"]["records"]
    assert measured["bench_answer.py::test_answer[rellax_vocab]"]["median_s"] > 0


def test_a_dry_run_has_no_verdicts(dry_run: Path) -> None:
    text = (dry_run / "dry-run.md").read_text(encoding="utf-8")
    assert text.count("not measured: a dry run") == len(BARS)
    for title in ("Bars", "Sections", "Ceilings", "Sizes", "Benchmarks", "Configurations"):
        assert f"\n## {title}\n" in text
    assert "What went wrong" not in text


def test_charts_of_either_file(dry_run: Path, tmp_path: Path) -> None:
    charts = ["roofline", "speedup", "sweep"]
    assert [(dry_run / f"dry-run-{chart}.png").stat().st_size > 10_000 for chart in charts] == [True] * 3
    stats = {"stats": {"median": 2.0}, "extra_info": {"bytes": 8, "flops": 16}}
    names = [
        f"benchmarks/bench_cflora.py::test_cflora[bf16-{variant}]" for variant in ("rellax", "published")
    ]
    file = tmp_path / "plain.json"
    file.write_text(json.dumps({"benchmarks": [{"fullname": name, **stats} for name in names]}))
    assert [path.name for path in plot(file, tmp_path)] == ["plain-roofline.png", "plain-speedup.png"]


def run(tmp_path: Path, *chosen: Section, budget: float = 3600.0) -> dict[str, Any]:
    """The sections in the file after a run."""
    path = tmp_path / "results.json"
    run_sections(chosen, {"sections": {}}, path, budget, os.environ)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["sections"]
    return found


def section(name: str, *programs: str, **options: Any) -> Section:
    return Section(name, name, [["-c", program] for program in programs], 10, **options)


def test_what_goes_wrong_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        section("raises", EMIT + "emit('a', x=1); raise ValueError('so it goes')", EMIT + "emit('b', x=2)"),
        section("killed", "import os; os.kill(os.getpid(), 9)"),
        section("absent", "", needs=["no_such_package"]),
        section("empty", nothing="nothing to do"),
        section("refuses", EMIT + "emit('skipped', reason='no such device')"),
        section("good", EMIT + "emit('a', x=1); emit('a', x=2)"),
    )
    assert {name: part["status"] for name, part in found.items()} == {
        "raises": "failed",
        "killed": "failed",
        "absent": "skipped",
        "empty": "skipped",
        "refuses": "skipped",
        "good": "done",
    }
    assert "ValueError: so it goes" in found["raises"]["reason"]
    assert found["raises"]["records"] == {"a": {"x": 1}, "b": {"x": 2}}
    assert "signal 9" in found["killed"]["reason"]
    assert found["absent"]["reason"] == "not installed: no_such_package"
    assert found["empty"]["reason"] == "nothing to do"
    assert found["refuses"]["reason"] == "no such device"
    assert found["good"]["records"] == {"a": {"x": 2}}
    wrong = {"machine": "m", "dry": False, "command": "", "commit": "", "started": "", "sections": found}
    assert report.wrong(wrong)
    assert "so it goes" in report.report(wrong)


def test_a_section_ends_with_its_time_and_the_next_may_have_too_little(tmp_path: Path) -> None:
    sleep = "import subprocess, time; subprocess.Popen(['sleep', '98765']); emit('a', x=1); time.sleep(99)"
    both = [section("slow", EMIT + sleep, EMIT + "emit('b', x=2)", least=1), section("late", "", least=99)]
    found = run(tmp_path, *both, budget=40)
    assert found["slow"]["status"] == "stopped"
    assert found["slow"]["reason"].endswith(": its 10 s were over")
    assert found["slow"]["records"] == {"a": {"x": 1}, "b": {"x": 2}}
    assert found["late"]["status"] == "skipped"
    assert "it needs 99 s" in found["late"]["reason"]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 98765" not in running


def test_a_kill_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--only", "machine,sanitizer"]
    path = tmp_path / "dry-run.json"
    process = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not path.exists() or len(json.loads(path.read_text(encoding="utf-8"))["sections"]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait(20)
    found = json.loads(path.read_text(encoding="utf-8"))["sections"]
    assert found["machine"]["status"] == "done"
    assert "copy" in found["machine"]["records"]
    assert found["sanitizer"]["status"] == "unfinished"
    assert "| unfinished |" not in (tmp_path / "dry-run.md").read_text(encoding="utf-8")


def test_some_sections_leave_the_others_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dry-run.json"
    kept = {"title": "kept", "status": "done", "reason": "", "seconds": 1.0, "records": {"a": {}}}
    file.write_text(json.dumps({"sections": {"sweep": kept, "sanitizer": kept}}))
    assert main(["--dry", "--only", "sanitizer", "--out", str(tmp_path)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert found["sweep"] == kept
    assert found["sanitizer"]["status"] == "skipped"
    assert main(["--dry", "--only", "nothing", "--out", str(tmp_path)]) == 2
    assert "--only: expected some of machine, correctness," in capsys.readouterr().err


def test_without_a_gpu_and_not_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path)]) == 2
    assert "expected a GPU, found none (torch sees no CUDA device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


TESTS = """
import pytest
import no_such_package_here
"""
MIXED = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_missing(): import no_such_package_here
@pytest.mark.skip(reason="for a reason")
def test_skipped(): pass
"""


def test_records_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text(TESTS)
    (tmp_path / "test_mixed.py").write_text(MIXED)
    command = [*PYTEST, "--continue-on-collection-errors", "-c", os.devnull, "--rootdir", str(tmp_path)]
    found = run(tmp_path, Section("tests", "", [[*command, str(tmp_path)]], 10))["tests"]
    assert found["status"] == "done"
    mixed, broken = found["records"]["test_mixed.py"], found["records"]["test_broken.py"]
    assert mixed["outcomes"] == {"passed": 1, "failed": 1, "cannot run": 1, "skipped": 1}
    assert len(mixed["failures"]) == 1
    assert mixed["failures"][0].startswith("test_mixed.py::test_bad: ")
    assert mixed["skips"] == ["for a reason"]
    assert broken["outcomes"] == {"cannot run": 1}
    assert broken["missing"] == ["no_such_package_here"]


def test_a_table_has_its_own_values_for_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "architecture", lambda device: "sm_90" if device.type == "cuda" else "")
    table, gpu = Tuned("table", {"a": 1, "b": 2}, sm_90={"b": 3}), torch.device("cuda")
    assert table.on(torch.device("cpu")) == {"a": 1, "b": 2}
    assert table.on(gpu) == {"a": 1, "b": 3}
    with table.trial(gpu, {"a": 4}):
        assert table.on(gpu) == {"a": 4, "b": 3}
        assert table.on(torch.device("cpu")) == {"a": 1, "b": 2}
    assert table.on(gpu) == {"a": 1, "b": 3}


def test_what_was_found_is_kept_for_an_architecture_that_no_table_lists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RELLAX_CACHE", str(tmp_path))
    monkeypatch.setattr(_tuning, "architecture", lambda device: "sm_120" if device.type == "cuda" else "")
    table, gpu = Tuned("table", {64: (1, 2), "b": 2}, sm_90={"b": 3}), torch.device("cuda")
    assert table.on(gpu) == table
    table.remember(gpu, {64: (3, 4)})
    table.remember(gpu, {"b": 5})
    assert table.on(gpu) == {64: (3, 4), "b": 5}
    assert table.on(torch.device("cpu")) == table
    for other in (
        Tuned("other", {64: (1, 2), "b": 2}),
        Tuned("table", {64: (1, 2), "b": 7}),  # found beside other usual values
        Tuned("table", {64: (1, 2), "b": 2}, sm_120={}),
    ):
        assert other.on(gpu) == other


def test_verdicts() -> None:
    records = {"a 1": {"t": {"rellax": 2.0}}, "a 2": {"t": {"rellax": 3.0}}, "b": {"t": 4}}
    parts = {"one": {"status": "stopped", "reason": "time was over", "records": records}}
    bar = Bar("", Source("one", "a 1", "t.rellax"), "<=", 3.0)
    assert bar.judge(parts) == ("met", 2.0)
    bar = Bar("", Source("one", "a .*", "t.rellax", max), "<=", 3.0)
    assert bar.judge(parts) == ("partial", 3.0)
    assert bar.judge({"one": parts["one"] | {"status": "done"}}) == ("met", 3.0)
    bar = Bar("", Source("one", "a .*", "t.rellax", min), ">=", 0.6, Source("one", "b", "t"))
    assert bar.judge(parts) == ("missed", 0.5)
    verdict, value = Bar("", Source("one", "c", "t"), "<=", 1.0).judge(parts)
    assert value is None
    assert verdict == "not measured: section one (stopped, time was over) has no t of c"
    verdict, _ = Bar("", Source("two", "c", "t"), "<=", 1.0).judge(parts)
    assert verdict == "not measured: section two was not run"


def test_a_peer_that_fails_takes_no_other_with_it() -> None:
    def broken() -> None:
        raise RuntimeError("so it goes")

    runs = {"rellax": lambda: None, "peer": lambda: None, "broken": broken}
    found = sweep._time(runs, 1.0, 1.0)
    assert found["failed"] == {"broken": "RuntimeError: so it goes"}
    assert list(found["over_rellax"]) == ["peer"]
    with pytest.raises(RuntimeError, match="so it goes"):
        sweep._time({"rellax": broken}, 1.0, 1.0)


def test_near_scores_may_swap_and_equal_ones_may_not() -> None:
    items = {"embeddings": torch.tensor([[1.0], [0.5], [0.5], [0.5 + 2.0**-22], [0.4]])}
    ends = {"target": torch.tensor([0]), "user": torch.tensor([1]), "end": torch.tensor([4])}
    history = {"items": torch.tensor([4, 1, 2, 3, 4]), "offsets": torch.tensor([0, 1, 5]), **ends}
    for inputs, first in (({"queries": torch.tensor([0])}, 1), (history, 0)):
        expected = torch.tensor([[2, 0, 1, 3]]) + first
        near, equal, wrong = (expected[:, order] for order in ([1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]))
        correctness.assert_same(items | inputs, near, expected)
        with pytest.raises(AssertionError, match="in another order"):
            correctness.assert_same(items | inputs, equal, expected)
        with pytest.raises(AssertionError, match=r"by up to 0\.1"):
            correctness.assert_same(items | inputs, wrong, expected)


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", {"reported": 0, "failures": []}),
        (
            "= RACECHECK SUMMARY: 0 hazards displayed (0 errors)",
            {"reported": 0, "failures": []},
        ),
        (
            "========= Invalid __global__ read of size 16 bytes\n"
            "=========     at _shrink_kernel+0x2f0\n"
            "========= ERROR SUMMARY: 2 errors",
            {
                "reported": 2,
                "failures": [
                    "2 reported",
                    "Invalid __global__ read of size 16 bytes",
                    "at _shrink_kernel+0x2f0",
                ],
            },
        ),
        ("it is not supported here", {"failures": ["no summary: it is not supported here"]}),
    ],
)
def test_what_the_sanitizer_says(output: str, found: dict[str, Any]) -> None:
    assert sanitizer.judge(output) == found


def test_the_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.find() == str(tool)
