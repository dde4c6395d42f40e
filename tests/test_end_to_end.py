"""The real language model on the real data, with few samples: what `make demo` does."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rellax.ctr import cli
from rellax.ctr.config import read_config
from rellax.ctr.demo import TITLES
from rellax.ctr.train import train

SIZES = ["--shots", "16", "--k", "3", "--test-samples", "24", "--validation-samples", "16"]


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "--crm-epochs", "2", *SIZES]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "metrics.json").read_text())
    assert list(results) == list(TITLES)
    for name, title in TITLES.items():
        assert title in shown
        assert results[name]["samples"] == 24
        assert 0 < results[name]["log_loss"] < 1.5
    whole = json.loads((out / "din" / "metrics.json").read_text())["test"]
    assert whole["samples"] == 9529
    assert whole["auc"] > 0.7
    assert max(step["peak_gib"] for step in json.loads((out / "steps.json").read_text()).values()) < 8
    assert "rellax demo" in (out / "report.md").read_text()

    # What is finished is not repeated.
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*") if path.is_file()}
    assert len(made) > 50
    assert cli.main(command) == 0
    assert capsys.readouterr().out == shown
    assert {path: path.stat().st_mtime_ns for path in made} == made

    # The same seed, in bfloat16 where the machine has it: the same bits.
    train(read_config(out / "rella"), tmp_path / "again", progress=False)
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (out / "rella" / "metrics.json").read_bytes()
    one, two = (pq.read_table(run / "predictions.parquet") for run in (out / "rella", tmp_path / "again"))
    assert one.equals(two)

    table = tmp_path / "new.csv"
    table.write_text("user_id,item_id\n1,50\n7,181\n")
    assert (
        cli.main(["predict", "rellax", str(table), "--out", str(tmp_path / "scored.csv"), "--work", str(out)])
        == 0
    )
    assert (tmp_path / "scored.csv").read_text().count("\n") == 3
