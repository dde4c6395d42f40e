"""Temperature scaling and stacking: the minimum of the likelihood, on validation alone, and what uses it."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.special import expit, logit
from sklearn.metrics import log_loss, roc_auc_score
from workspace import Workspace

from rellax.ctr import cli, metrics
from rellax.ctr import evaluate as evaluate_module
from rellax.ctr.calibration import (
    LIMITS,
    Calibration,
    calibrated_metrics,
    fit_stacking,
    fit_temperature,
    write_calibration,
)
from rellax.ctr.dataset import Dataset
from rellax.ctr.evaluate import calibrate, evaluate
from rellax.ctr.predictions import Predictions
from rellax.ctr.predictor import Predictor
from rellax.ctr.train import train
from rellax.errors import InputError


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Path:
    folder = workspace.root / "uncalibrated"
    train(workspace.config(epochs=1), folder, progress=False)
    evaluate(folder, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    return Calibration(1 / temperature).apply(probabilities)


def sample(temperature: float, n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities whose logits are `temperature` times too large."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, n)
    return (rng.random(n) < expit(logits)).astype(np.int8), expit(temperature * logits)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_it_finds_what_logits_were_multiplied_by(temperature: float) -> None:
    labels, probabilities = sample(temperature)
    found = fit_temperature(labels, probabilities).temperature
    assert found == pytest.approx(temperature, rel=0.05)

    def loss(t: float) -> float:
        return float(log_loss(labels, at_temperature(probabilities, t)))

    grid = found * np.exp(np.linspace(-0.5, 0.5, 21))
    assert min(map(loss, grid)) >= loss(found) - 1e-12
    assert loss(found) <= loss(1.0)
    assert loss(found * 1.1) > loss(found) < loss(found / 1.1)


def test_the_order_of_predictions_stays() -> None:
    labels, probabilities = sample(1.0)
    for temperature in (0.5, 1.0, 7.0):
        changed = at_temperature(probabilities, temperature)
        assert roc_auc_score(labels, changed) == roc_auc_score(labels, probabilities)
        assert np.array_equal(changed >= 0.5, probabilities >= 0.5)
        assert changed == pytest.approx(expit(logit(probabilities) / temperature), abs=1e-15)
    assert at_temperature(probabilities, 1.0) is probabilities
    assert at_temperature(np.array([0.0, 0.5, 1.0]), 2.0).tolist() == [0.0, 0.5, 1.0]


def test_it_stays_within_limits() -> None:
    labels = np.array([0, 0, 1, 1])

    def fitted(*probabilities: float) -> float:
        return fit_temperature(labels, np.array(probabilities)).temperature

    assert fitted(0.3, 0.4, 0.6, 0.8) == pytest.approx(LIMITS[0], rel=1e-3)
    assert fitted(0.8, 0.6, 0.4, 0.3) == pytest.approx(LIMITS[1], rel=1e-3)
    assert math.isfinite(fitted(0.0, 1.0, 1.0, 1.0))
    with pytest.raises(InputError, match=r"labels: expected both 0 and 1 .* got 3 of one"):
        fit_temperature(np.ones(3), np.full(3, 0.4))


def test_a_run_is_calibrated_on_validation_samples(
    workspace: Workspace, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "test" / "predictions.parquet").read_bytes()
    plain = json.loads((run / "test" / "metrics.json").read_text())
    assert "calibrated" not in plain
    shutil.rmtree(run / "test")  # fitting needs none of it
    result = calibrate(run)
    shutil.copytree(workspace.root / "uncalibrated" / "test", run / "test")

    used = pq.read_table(run / "predictions.parquet")["sample"].to_numpy()
    assert (Dataset.load(workspace.data).samples.split[used] == 1).all()
    known = Predictions.read(run)
    labels, probabilities = known.labels, known.probabilities
    assert result["temperature"] == fit_temperature(labels, probabilities).temperature
    assert (result["samples"], result["split"]) == (len(used), "valid")
    assert result["log_loss"]["after"] <= result["log_loss"]["before"]
    assert result == json.loads((run / "calibration.json").read_text())

    # Evaluation adds what it changes, and scores nothing again.
    monkeypatch.setattr(evaluate_module, "predict_probabilities", None)
    for _ in range(2):
        found = evaluate(run, progress=False)
        assert found == json.loads((run / "test" / "metrics.json").read_text())
    assert {key: found[key] for key in plain} == plain
    assert found.keys() - plain.keys() == {"calibrated"}
    known = Predictions.read(run / "test")
    labels, probabilities = known.labels, known.probabilities
    changed = at_temperature(probabilities, result["temperature"])
    assert found["calibrated"]["temperature"] == result["temperature"]
    assert found["calibrated"]["log_loss"] == pytest.approx(log_loss(labels, changed), abs=1e-12)
    assert found["calibrated"]["ece"] != found["ece"]
    assert roc_auc_score(labels, changed) == found["auc"]
    assert (run / "test" / "predictions.parquet").read_bytes() == before
    (run / "calibration.json").unlink()
    assert evaluate(run, progress=False) == plain


def test_prediction_uses_it_unless_told_not_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("user_id,item_id\n3,4\n5,17\n")
    rows = [{"user_id": 3, "item_id": 4}, {"user_id": 5, "item_id": 17}]
    plain = Predictor(run).predict(rows)
    temperature = calibrate(run)["temperature"]
    assert abs(temperature - 1) > 1e-3
    calibrated = Predictor(run)
    assert calibrated.calibration.temperature == pytest.approx(temperature, rel=1e-12)
    assert calibrated.predict(rows) == pytest.approx(at_temperature(plain, temperature), abs=1e-12)
    assert Predictor(run, calibrated=False).predict(rows).tolist() == plain.tolist()
    for switch, expected in (([], calibrated.predict(rows)), (["--no-calibration"], plain)):
        command = ["predict", run.name, str(tmp_path / "new.csv"), "--out", str(tmp_path / "out.parquet")]
        assert cli.main([*command, "--work", str(run.parent), *switch]) == 0
        found = pq.read_table(tmp_path / "out.parquet")["probability"].to_pylist()
        assert found == pytest.approx(expected, abs=2e-6)


def test_stacking_finds_the_weights() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 20_000))
    labels = (rng.random(20_000) < expit(0.4 * one + 0.9 * other - 0.3)).astype(np.int8)
    found = fit_stacking(labels, expit(one), expit(other), "crm")
    assert [found.weight, found.crm_weight, found.bias] == pytest.approx([0.4, 0.9, -0.3], abs=0.05)
    stacked = found.apply(expit(one), expit(other))
    assert stacked == pytest.approx(expit(found.weight * one + found.crm_weight * other + found.bias))
    for name, change in (("weight", 0.02), ("crm_weight", -0.02), ("bias", 0.02)):
        worse = replace(found, **{name: getattr(found, name) + change})
        assert log_loss(labels, worse.apply(expit(one), expit(other))) > log_loss(labels, stacked)
    sure = found.apply(np.array([0.0, 1.0]), np.array([1.0, 0.0]))  # fp32 rounds to these
    assert np.isfinite(sure).all()
    with pytest.raises(InputError, match=r"labels: expected both 0 and 1 .* got 2 of one"):
        fit_stacking(np.zeros(2), sure, sure, "crm")


def test_a_run_stacked_on_a_classical_model(
    workspace: Workspace, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted on validation samples; test and prediction read the classical model's answers beside it."""
    plain = json.loads((run / "test" / "metrics.json").read_text())
    result = calibrate(run, crm=workspace.crm)
    assert result == json.loads((run / "calibration.json").read_text())
    fitted = Calibration(*(result[name] for name in ("weight", "crm_weight", "bias")), str(workspace.crm))
    every, known = Predictions.read(workspace.crm).probabilities, Predictions.read(run)
    samples, labels, probabilities = known.samples, known.labels, known.probabilities
    assert fitted == fit_stacking(labels, probabilities, every[samples], str(workspace.crm))
    assert result["log_loss"]["after"] <= result["log_loss"]["before"]
    assert result["auc"]["before"] == roc_auc_score(labels, probabilities)

    monkeypatch.setattr(evaluate_module, "predict_probabilities", None)
    found = evaluate(run, progress=False)
    assert {key: found[key] for key in plain} == plain
    known = Predictions.read(run / "test")
    samples, labels, probabilities = known.samples, known.labels, known.probabilities
    stacked = fitted.apply(probabilities, every[samples])
    assert found["calibrated"]["auc"] == roc_auc_score(labels, stacked) != found["auc"]
    assert found["calibrated"]["log_loss"] == pytest.approx(log_loss(labels, stacked), abs=1e-12)
    users = Dataset.load(workspace.data).samples.user[samples]
    for result, predicted in ((found, probabilities), (found["calibrated"], stacked)):
        expected = metrics.evaluate(labels, predicted, users)["auc_interval"]
        assert result["auc_interval"] == expected  # of whole users
    monkeypatch.undo()

    # A service has the classical model answer too, of rows that can be answered.
    data = Dataset.load(workspace.data)
    few = data.indices("test")[:3]
    users, items = data.users["user_id"].to_pylist(), data.items["item_id"].to_pylist()
    rows = [
        {
            "user_id": users[data.samples.user[sample]],
            "item_id": items[data.samples.item[sample]],
            "time": int(data.behaviour_times[data.history(sample).stop]),
        }
        for sample in few
    ]
    predictor = Predictor(run)
    alone = Predictor(run, calibrated=False).predict(rows)
    assert predictor.predict(rows) == pytest.approx(fitted.apply(alone, every[few]), abs=2e-6)
    first, wrong, last = predictor.predict_each([rows[0], {"user_id": -1, "item_id": items[0]}, rows[2]])
    assert isinstance(wrong, InputError)
    assert [first, last] == pytest.approx(predictor.predict([rows[0], rows[2]]).tolist(), abs=2e-6)

    values = json.loads((run / "calibration.json").read_text())
    for name, value, words in (
        ("crm_sha256", "0", "expected the calibration with the model in .*, which has changed since"),
        ("bias", None, "expected a number for bias, got None"),
        ("crm", 3, "expected the folder of a model for crm, got 3"),
        ("crm", str(tmp_path), "model.safetensors: expected a file of `rellax crm`, found none"),
    ):
        (run / "calibration.json").write_text(json.dumps(values | {name: value}))
        with pytest.raises(InputError, match=words):
            Predictor(run)
    with pytest.raises(InputError, match=r"predictions.parquet: expected predictions, found none"):
        calibrate(run, crm=tmp_path)
    shutil.copytree(workspace.crm, tmp_path / "newer")
    inputs = json.loads((tmp_path / "newer" / "inputs.json").read_text())
    (tmp_path / "newer" / "inputs.json").write_text(json.dumps(inputs | {"samples.parquet": "0"}))
    with pytest.raises(InputError, match=r"crm: expected one of the samples that .* was trained on"):
        calibrate(run, crm=tmp_path / "newer")
    shutil.copytree(workspace.crm, tmp_path / "other")
    table = pq.read_table(workspace.crm / "predictions.parquet")
    pq.write_table(table.slice(0, 5), tmp_path / "other" / "predictions.parquet")
    with pytest.raises(InputError, match="expected predictions of 12 samples, found none of 12 of them"):
        calibrate(run, crm=tmp_path / "other")
    table = table.set_column(1, "label", pc.subtract(pa.scalar(1, pa.int8()), table["label"]))
    pq.write_table(table, tmp_path / "other" / "predictions.parquet")
    with pytest.raises(InputError, match=r"expected the labels of .*, found those of other data"):
        calibrate(run, crm=tmp_path / "other")


def test_what_a_calibration_changes_has_intervals_of_whole_users_and_its_seed() -> None:
    labels, probabilities = sample(1.0, 200)
    users = np.arange(200) // 8
    for calibration, names in (
        (Calibration(0.5), ("log_loss", "log_loss_interval", "ece")),
        (Calibration(0.5, 0.2, 0.1, "crm"), ("auc", "auc_interval", "log_loss", "log_loss_interval", "ece")),
    ):
        found = calibrated_metrics(labels, probabilities, users, calibration, seed=3)
        expected = metrics.evaluate(labels, probabilities, users, seed=3)
        assert found == calibration.to_json() | {name: expected[name] for name in names}
    assert expected["auc_interval"] != metrics.evaluate(labels, probabilities, users)["auc_interval"]


def test_it_says_what_speaks_against_it(
    workspace: Workspace, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="rellax")
    labels, probabilities = sample(1.0)

    def said(labels: np.ndarray, probabilities: np.ndarray, **stacked: Any) -> list[str]:
        caplog.clear()
        write_calibration(run, labels, probabilities, **stacked)
        return [record.getMessage() for record in caplog.records]

    assert said(labels, probabilities) == []
    assert said(labels, 1 - probabilities) == [
        "calibrate: temperature 100 is at its limit: the run says nothing of the labels"
    ]
    assert said(labels, 0.1 + 0.8 * labels) == [
        "calibrate: temperature 0.01 is at its limit: the run is right on every sample"
    ]
    few = np.append(np.flatnonzero(labels == 1)[:200], np.flatnonzero(labels == 0)[:19])
    assert said(labels[few], probabilities[few]) == [
        "calibrate: expected at least 20 validation samples of each label, got 19 of one"
    ]
    enough = np.append(few, np.flatnonzero(labels == 0)[19])
    assert said(labels[enough], probabilities[enough]) == []
    one, other = np.random.default_rng(3).normal(size=(2, len(labels)))
    for weights, who in (((-0.4, 0.9), "the run"), ((0.4, -0.9), "the CRM")):
        labels = (np.random.default_rng(4).random(len(one)) < expit(weights @ np.stack([one, other]))).astype(
            int
        )
        (negative,) = said(labels, expit(one), crm=str(workspace.crm), crm_probabilities=expit(other))
        assert negative.startswith(f"calibrate: the weight of {who} is negative, -")


def test_the_command(workspace: Workspace, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ["--work", str(run.parent)]
    assert cli.main(["calibrate", run.name, *work]) == 0
    result = json.loads((run / "calibration.json").read_text())
    first, ece, loss = capsys.readouterr().out.splitlines()
    assert first == f"temperature {result['temperature']:.4f}, fitted on 12 validation samples:"
    assert ece == f"ece       {result['ece']['before']:.4f} -> {result['ece']['after']:.4f}"
    assert loss.startswith("log_loss  ")
    assert cli.main(["evaluate", run.name, *work]) == 0
    shown = capsys.readouterr().out
    assert f"temperature          {result['temperature']:.4f}\ncalibrated log_loss  0." in shown

    assert cli.main(["calibrate", run.name, "--crm", str(workspace.crm), *work]) == 0
    first, auc, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"\S+ of its log-odds, \S+ of those of \S+, and [+-]\S+, fitted on 12 validation samples:", first
    )
    assert auc.startswith("auc       ")
    assert cli.main(["evaluate", run.name, *work]) == 0
    shown = capsys.readouterr().out
    assert f"crm                  {workspace.crm}\ncalibrated auc       0." in shown


def test_another_adapters_calibration(run: Path) -> None:
    calibrate(run)
    path = run / "calibration.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"adapter": "0"}))
    for use in (Predictor, evaluate):
        with pytest.raises(
            InputError, match=r"calibration.json: expected the calibration of this run's adapter"
        ):
            use(run)
    path.write_text(json.dumps(values | {"temperature": -1}))
    with pytest.raises(InputError, match=r"calibration.json: expected a positive temperature, got -1"):
        Predictor(run)
    with pytest.raises(InputError, match=r"config.json: expected a JSON file, found none"):
        calibrate(run / "none")
