"""The study in small: the grid and its order, resuming, growing, and a report that follows from numbers."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logit
from sklearn.metrics import roc_auc_score
from workspace import Workspace

from rellax import subr
from rellax._files import read_json, write_json
from rellax.ctr import lab
from rellax.ctr.config import StudyConfig
from rellax.ctr.dataset import Dataset
from rellax.ctr.lab import duration
from rellax.ctr.methods import METHODS
from rellax.ctr.metrics import paired_bootstrap
from rellax.ctr.predictions import Predictions
from rellax.ctr.retrieval import read_positions
from rellax.ctr.study import Cell, cells, grid, report, reproduce, targets
from rellax.ctr.study.results import Finished, Results, Scored, signed
from rellax.errors import InputError


@pytest.fixture(scope="module")
def config(workspace: Workspace) -> StudyConfig:
    return StudyConfig(
        model=str(workspace.model),
        data=str(workspace.data),
        test_samples=11,
        validation_samples=12,
        batch_size=4,
        crm_epochs=1,
        methods=(
            "share-retrieved",
            "zero-shot-recent",
            "zero-shot-retrieved",
            "lora-recent",
            "lora-boosted",
            "rellax-boosted",
        ),
        crms=("DIN", "DeepFM"),
        crm="DIN",
        recent_share=0.5,
        lr=0.003,
        lr2=0.004,
        soft_prompt_lr=0.001,
        epochs2=2,
        k=(2, 3),
        shots=(6,),
        seeds=(0, 1),
    )


def test_the_grid() -> None:
    config = StudyConfig(methods=("rellax",), crms=("SIM",), k=(5,), shots=(512, 256), seeds=(0, 1))
    names = [cell.name for cell in cells(config)]
    one = ["sim-n{0}-s{1}", "rella-k5-n{0}-s{1}", "rellax-k5-n{0}-s{1}"]
    expected = [
        name.format(shots, seed)
        for seed in (0, 1)
        for name, shots in [("sim-all-s{1}", 0), *((name, n) for n in (256, 512) for name in one)]
    ]
    assert names == expected
    held_out = cells(dataclasses.replace(config, crm_samples="held-out", seeds=(0,), shots=(256,)))
    assert [cell.name for cell in held_out] == [
        "sim-all-s0",
        "sim-n256-s0",
        "rella-k5-n256-s0",
        "sim-without256-s0",
        "rellax-k5-n256-s0",
    ]
    assert [cell.title for cell in held_out][-2:] == [
        "SIM, all but 256 samples, seed 0",
        "ReLLa + SPA + CFLoRA (ReLLaX), K = 5, 256 shots, seed 0",
    ]
    boosted = cells(dataclasses.replace(config, methods=("rellax-boosted",), seeds=(0,), shots=(256,)))
    assert [cell.name for cell in boosted][-2:] == ["sim-without256-s0", "rellax-boosted-k5-n256-s0"]
    assert len(cells(StudyConfig())) == 4 * 5 + 3 * 6 + 6 * (6 * 3) + 9 * 5 * 6 * 3 + 6 * 3
    assert Cell("zero-shot-recent", 10).result == "zero-shot-recent-k10/test/predictions.parquet"


def test_a_plan_leaves_the_folder_as_it_is(config: StudyConfig, tmp_path: Path) -> None:
    for similarity in ("text", "text+crm"):
        planned = dataclasses.replace(config, similarity=similarity)
        assert "0 of 32 runs are finished" in reproduce(planned, tmp_path / "study", only="plan")
        with pytest.raises(InputError, match="study: expected a study, found none; `rellax reproduce`"):
            reproduce(planned, tmp_path / "study", only="report")
    assert not (tmp_path / "study").exists()
    write_json(tmp_path / "study" / "config.json", {"model": "DIN", "shots": 4})
    with pytest.raises(InputError, match="expected the settings of a study, found another configuration"):
        reproduce(config, tmp_path / "study", only="report")


def test_sizes_are_checked_before_anything_is_run(config: StudyConfig, tmp_path: Path) -> None:
    train = len(Dataset.load(config.data).indices("train"))
    held_out = rf"shots: expected fewer than all {train} training samples, .* on the others, got {train}"
    for options, words in (
        (
            {"shots": (6, train + 1)},
            rf"shots: expected 1 to {train} samples of split 'train', got {train + 1}",
        ),
        ({"shots": (train,)}, held_out),
        ({"test_samples": 0}, "test_samples: expected 1 to 12 samples of split 'test', got 0"),
    ):
        for only in ("plan", None):
            with pytest.raises(InputError, match=words):
                reproduce(dataclasses.replace(config, **options), tmp_path / "study", only=only)
    assert not (tmp_path / "study").exists()


def test_one_behaviour_has_no_others(config: StudyConfig, tmp_path: Path) -> None:
    one = dataclasses.replace(config, methods=("share-retrieved",), crms=(), k=(1,), shots=(8192,))
    found = reproduce(one, tmp_path, progress=False)  # nothing is trained on the shots
    assert "| recent: each other | - |" in found
    assert "nan" not in found


def test_retrieval_by_the_classical_model_too(config: StudyConfig, tmp_path: Path) -> None:
    both = dataclasses.replace(config, similarity="text+crm")
    reproduce(both, tmp_path, progress=False, only="plan")
    assert not (tmp_path / "embeddings").exists()
    study = grid._Study(both, tmp_path, "cpu", progress=False, jobs=1)
    study.prepare()
    study.retrieve()
    assert read_json(tmp_path / "embeddings" / "config.json")["crm"] == str(tmp_path / "din-all-s0")

    # How unlike each other and the target the behaviours of each prompt are, one by one.
    dataset, rows = Dataset.load(config.data), subr.load_embeddings(tmp_path / "embeddings").numpy()
    samples = dataset.indices("test")
    of = dataset.samples
    test = Scored(samples, of.label[samples], of.user[samples], of.position[samples])
    nearest = read_positions(tmp_path / "retrieved", dataset, 3)
    found = report._unlikeness(tmp_path, both, dataset, test, [2, 3])
    assert len(found) == 4
    for column, k in enumerate((2, 3)):
        for title in ("recent", "retrieved"):
            within, apart = [], []
            for sample in samples:
                end = int(of.position[sample])
                shown = list(range(end - k, end))
                if title == "retrieved":
                    others = [row for row in nearest[sample, :k] if row < end - 1]
                    shown = [end - 1, *others[: k - 1]]  # half of them, rounded down, are the most recent
                items = dataset.behaviour_items[dataset.history(sample)][shown]
                pairs = itertools.combinations(rows[items], 2)
                within.append(np.mean([1 - one @ other for one, other in pairs]))
                apart.append(np.mean([1 - one @ rows[of.item[sample]] for one in rows[items]]))
            for other, values in (("each other", within), ("the target", apart)):
                assert found[title, other][column] == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"similarity": "crm"}, r"similarity: expected one of text, text\+crm, got 'crm'"),
        ({"methods": ("lora",)}, "methods: expected some of share-recent, .*, got 'lora'"),
        ({"crms": ("GRU",)}, "crms: expected some of DIN, .*, got 'GRU'"),
        ({"k": (5, 5)}, "k: expected distinct numbers of at least 1, got 5, 5"),
        ({"shots": ()}, "shots: expected distinct numbers of at least 1, got none"),
        ({"recent_share": -0.1}, r"recent_share: expected a fraction in \[0, 1\), got -0.1"),
        ({"crm_samples": "some"}, "crm_samples: expected one of all, held-out, shots, got 'some'"),
    ],
    ids=["similarity", "methods", "crms", "k", "shots", "recent_share", "crm_samples"],
)
def test_bad_config(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cells(StudyConfig(**options))


def test_stopped_resumed_grown_and_reported(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rellax")
    small = dataclasses.replace(config, seeds=(0,))
    plan = reproduce(small, tmp_path / "study", progress=False, only="plan")
    assert "| Zero-shot LLM, K most recent | 0 | 2 | 1 min |" in plan
    assert "0 of 19 runs are finished, about 2 min left on this machine." in plan

    # Stopped at the first training run: what there is can be looked at, and is not made again.
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lab, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            reproduce(small, tmp_path / "study", progress=False)
    report = reproduce(small, tmp_path / "study", only="report")
    assert "**8 of 18 runs of the grid are not finished yet.**" in report
    others = dataclasses.replace(small, data=None, batch_size=5)  # the study has its own settings
    assert reproduce(others, tmp_path / "study", only="report") == report
    with pytest.raises(InputError, match="expected a finished run of the grid, found none"):
        reproduce(dataclasses.replace(small, crms=(), k=(9,)), tmp_path / "study", only="report")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*/**/predictions.parquet")}
    caplog.clear()
    report = reproduce(small, tmp_path / "study", progress=False)
    assert "[11/19]" in caplog.text
    assert "[19/19]" in caplog.text
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert (tmp_path / "study" / "report.md").read_text() == report
    assert "not finished" not in report
    for name in ("auc-by-k.png", "auc-by-history.png", "heterogeneity.png"):
        assert (tmp_path / "study" / name).read_bytes().startswith(b"\x89PNG")

    # A second seed only adds its own runs; other settings are refused.
    assert "19 of 32 runs are finished" in reproduce(config, tmp_path / "study", progress=False, only="plan")
    grown = reproduce(config, tmp_path / "study", progress=False)
    assert " ± " in grown
    assert "Of K retrieved behaviours 50% are the most recent ones." in grown
    records = {
        cell.name: read_json(tmp_path / "study" / cell.name / "config.json") for cell in cells(config)[-9:]
    }
    assert [records[f"{name}-k3-n6-s1"]["recent_share"] for name in ("lora-recent", "rella")] == [0.0, 0.5]
    names = ("lr", "epochs", "soft_prompt_lr")
    assert [records["rella-k3-n6-s1"][name] for name in names] == [0.003, 1, None]
    assert [records["rellax-boosted-k3-n6-s1"][name] for name in names] == [0.004, 2, 0.001]
    with (tmp_path / "study" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    (din,) = (row for row in rows if (row["method"], row["shots"], row["seed"]) == ("DIN", "all", "0"))
    chosen_by = read_json(tmp_path / "study" / "din-all-s0" / "metrics.json")["valid"]["auc"]
    assert float(din["validation_auc"]) == pytest.approx(chosen_by, abs=1e-3)
    assert len(rows) == 30
    assert {row["seed"] for row in rows} == {"", "0", "1"}
    assert all(0 <= float(row["auc"]) <= 1 for row in rows)
    assert all(bool(row["validation_auc"]) != row["method"].startswith("zero") for row in rows)
    with pytest.raises(InputError, match=r"holds a run with batch_size = 4, expected 5"):
        reproduce(dataclasses.replace(config, batch_size=5), tmp_path / "study", progress=False)

    # More test samples than there are: what is trained stays, all is scored on the others; fewer ones are
    # among them. How many prompts are at once changes none of that.
    more = dataclasses.replace(config, test_samples=99, micro_batch_size=3)
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*/log.jsonl")}
    plan = reproduce(more, tmp_path / "study", progress=False, only="plan")
    assert "| Zero-shot LLM, K most recent | 0 | 2 | 1 min |" in plan
    assert "12 of 32 runs are finished" in plan  # the classical models and the counts of liked ones
    assert "on the same 12 test samples" in reproduce(more, tmp_path / "study", progress=False)
    assert "nothing left to run" in reproduce(more, tmp_path / "study", progress=False, only="plan")
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert reproduce(config, tmp_path / "study", progress=False) == grown


def test_runs_side_by_side(config: StudyConfig, tmp_path: Path) -> None:
    small = dataclasses.replace(config, methods=("rellax",), crms=(), k=(2, 3), seeds=(0,))
    for jobs in (1, 2):
        reproduce(small, tmp_path / str(jobs), progress=False, jobs=jobs)
    results = [(tmp_path / str(jobs) / "results.csv").read_text() for jobs in (1, 2)]
    assert results[0].count("\n") == 1 + 5  # two runs of LoRA, two on top of them, one classical model
    assert results[0] == results[1]
    with pytest.raises(InputError, match="jobs: expected a positive number, got 0"):
        reproduce(small, tmp_path / "1", jobs=0)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


def test_too_many_at_a_time(tmp_path: Path) -> None:
    step = lab.Step("a", 1.0, out_of_memory)
    with pytest.raises(InputError, match="jobs: 2 at a time need more of the GPU's memory than there is"):
        lab.run_steps([step, lab.Step("b", 1.0, out_of_memory, after=["a"])], tmp_path / "steps.json", jobs=2)


def fail() -> None:
    raise InputError("lr: expected a finite loss")


def end_after(file: Path) -> None:
    for _ in range(100):
        if file.exists():
            return
        time.sleep(0.2)
    raise TimeoutError


def test_a_failure_is_told_at_once_and_what_runs_beside_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, begun = tmp_path / "told", []
    monkeypatch.setattr(lab.logger, "info", lambda _, *values: begun.append(values[2]))
    monkeypatch.setattr(lab.logger, "error", lambda words, *values: told.write_text(words % values))
    steps = [
        lab.Step("bad", 1.0, fail),
        lab.Step("long", 1.0, functools.partial(end_after, told)),
        lab.Step("next", 1.0, fail),
    ]
    with pytest.raises(InputError, match="lr: expected a finite loss"):
        lab.run_steps(steps, tmp_path / "steps.json", jobs=2)
    assert told.read_text() == "bad failed (lr: expected a finite loss); what has begun is finished"
    assert begun == ["bad", "long"]
    assert list(read_json(tmp_path / "steps.json")) == ["long"]


def finished(
    test: Scored, method: str, k: int | None, shots: int | None, strength: float, *, seeds: int = 2
) -> list[Finished]:
    """Runs whose scores hold `strength` times the label beside noise; their validation AUC is `strength`."""
    found = []
    for seed in range(seeds):
        noise = np.random.default_rng((seed, k or 0, shots or 0)).normal(size=len(test.rows))
        probabilities = 1 / (1 + np.exp(-(noise + strength * (test.labels - 0.5))))
        known = Predictions(test.rows, test.labels, probabilities)
        found.append(Finished.of(Cell(method, k, shots, seed), probabilities, strength, test, known))
    return found


def scored(n: int = 400) -> Scored:
    rng = np.random.default_rng(1)
    return Scored(np.arange(n), rng.integers(0, 2, n), rng.integers(0, 30, n), rng.integers(5, 300, n))


def results_of(runs: list[Finished], test: Scored) -> Results:
    return Results(runs, test, lambda _seed: test.rows[::2])


def test_results_are_means_over_seeds() -> None:
    test = scored()
    runs = finished(test, "rella", 5, 256, 1.0, seeds=3)
    results = results_of(runs, test)
    result = results.get("rella", 5, 256)
    assert result is not None
    aucs = [roc_auc_score(test.labels, run.probabilities) for run in runs]
    assert result.metrics["auc"] == pytest.approx((np.mean(aucs), np.std(aucs, ddof=1)))
    assert result.show("auc") == f"{np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f}"
    counts, means = zip(*results.by_history(result), strict=True)
    assert sum(counts) == 400
    middle = (test.histories >= 50) & (test.histories < 100)
    expected = np.mean([roc_auc_score(test.labels[middle], run.probabilities[middle]) for run in runs])
    assert (counts[2], means[2]) == (middle.sum(), pytest.approx(expected))
    assert results.get("rella", 10, 256) is None


def test_stacked_on_the_best_classical_model() -> None:
    test = scored(4000)
    runs = finished(test, "SIM", None, None, 1.0, seeds=3) + finished(test, "rella", 5, 256, 1.0)
    runs += [dataclasses.replace(run, cell=dataclasses.replace(run.cell, method="DIN")) for run in runs[:3]]
    results = results_of(runs, test)
    rella, best = results.get("rella", 5, 256), results.best_classical(None)
    assert rella is not None
    assert best is not None
    both, alone = results.stacked(rella, best)
    assert both.shape == alone.shape == (2, 4000)  # the seeds that both have
    assert alone == pytest.approx(np.stack([run.probabilities for run in runs[:2]]))
    for one, other, run in zip(both, alone, runs[3:5], strict=True):
        # The noise is independent: the sum of both is what can be known.
        known = roc_auc_score(test.labels, logit(other) + logit(run.probabilities))
        assert roc_auc_score(test.labels, one) == pytest.approx(known, abs=2e-3)
        assert known > roc_auc_score(test.labels, other) + 0.05
    section = report._stacked(results, 5, 256)
    assert "| LoRA on the mixture (ReLLa) | 2 | 0." in section
    assert "| DIN, all training samples | 3 |" in section
    (din,) = (line for line in section.splitlines() if line.startswith("| DIN"))
    assert "+0.000 [+0.000, +0.000]" in din  # the same predictions add nothing


def cells_of(lines: list[str]) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]


def test_the_main_table_subtracts_the_best_classical_models() -> None:
    test = scored()
    runs = finished(test, "rella", 5, 256, 2.0) + finished(test, "DIN", None, None, 1.0)
    runs += finished(test, "SIM", None, 256, 0.5)
    results = results_of(runs, test)
    rella, din, sim = (
        results.all[key] for key in (("rella", 5, 256), ("DIN", None, None), ("SIM", None, 256))
    )
    head, _, *rows = cells_of(report._main_table(results, 5, 256).splitlines())
    assert head[-2:] == ["AUC less SIM, same shots", "AUC less DIN, all samples"]
    assert [row[0] for row in rows] == [rella.title, "SIM, same shots", "DIN, all training samples"]
    for row, result in zip(rows, (rella, sim, din), strict=True):
        assert row[1] == result.show("auc")
        for cell, base in zip(row[-2:], (sim, din), strict=True):
            expected = "-" if result is base else signed(results.compare(result, base))
            assert cell == expected
    assert rows[0][-1].startswith("+0.")  # more is better
    assert rows[1][-1].startswith("-0.")
    (line,) = (
        row for row in cells_of(report._stacked(results, 5, 256).splitlines()) if row[0] == rella.title
    )
    assert line[-1].startswith("+0.")


def test_tables_and_lines_stand_where_their_columns_say(tmp_path: Path) -> None:
    test = scored()
    runs = finished(test, "rella", 5, 512, 2.0) + finished(test, "rella", 5, 256, 1.0)
    runs += finished(test, "DIN", None, None, 1.5, seeds=1) + finished(test, "DIN", None, 256, 0.5)
    untrained = finished(test, "zero-shot-recent", 5, 0, 0.3, seeds=1)  # the same for any number of shots
    results = results_of([*runs, *untrained], test)
    head, _, *rows = cells_of(report._by_shots(results, 5).splitlines())
    assert head == ["method", "256", "512"]
    auc = {key: result.show("auc") for key, result in results.all.items()}
    assert rows == [
        [METHODS["rella"].title, auc["rella", 5, 256], auc["rella", 5, 512]],
        ["DIN", auc["DIN", None, 256], "-"],
    ]
    report._write_csv(tmp_path / "results.csv", runs)
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    expected = [("rella", "5", "512"), ("rella", "5", "256"), ("DIN", "", "all"), ("DIN", "", "256")]
    assert list(dict.fromkeys((line["method"], line["k"], line["shots"]) for line in lines)) == expected
    assert [line["seed"] for line in lines] == ["0", "1", "0", "1", "0", "0", "1"]
    for line, run in zip(lines, runs, strict=True):
        assert float(line["log_loss"]) == pytest.approx(run.metrics["log_loss"], abs=1e-6)
        assert float(line["validation_auc"]) == pytest.approx(run.validation, abs=1e-6)


def test_histories_at_the_bounds_of_a_bin() -> None:
    histories = np.array([5, 19, 20, 49, 50, 99, 100, 199, 200, 900])
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 1, 0, 1])
    test = Scored(np.arange(10), labels, np.arange(10), histories)
    (run,) = finished(test, "rella", 5, 256, 1.0, seeds=1)
    run = dataclasses.replace(run, probabilities=np.where(labels == 1, 0.8, 0.3))
    results = results_of([run], test)
    found = results.by_history(results.all["rella", 5, 256])
    assert found == [
        (2, 1.0),
        (2, 1.0),
        (2, 1.0),
        (2, None),
        (2, 1.0),
    ]  # two samples of one class have no AUC


def test_k_is_chosen_on_validation_samples() -> None:
    test = scored()
    runs = finished(test, "rella", 5, 256, 0.5) + finished(test, "rella", 10, 256, 2.0)
    runs = [dataclasses.replace(run, validation=1 - run.validation / 4) for run in runs]
    assert results_of(runs, test).chosen_k(256) == 5  # although 10 is better on the test samples


def test_the_last_trained_method_decides_k_and_without_one_the_middle() -> None:
    test = scored()
    runs = [run for k in (2, 5, 10) for run in finished(test, "zero-shot-recent", k, 0, 1.0, seeds=1)]
    runs = [dataclasses.replace(run, validation=None) for run in runs]
    classical = finished(test, "DIN", None, 128, 1.0)
    results = results_of(runs + classical, test)
    assert (results.chosen_k(256), results.shots, results.ks) == (5, [], [2, 5, 10])
    trained = finished(test, "lora-recent", 5, 256, 2.0) + finished(test, "lora-recent", 10, 256, 1.0)
    trained += finished(test, "rella", 5, 256, 0.5) + finished(test, "rella", 10, 256, 1.0)
    results = results_of(runs + classical + trained, test)
    assert (results.chosen_k(256), results.shots) == (10, [256])
    assert results.get("zero-shot-recent", 5, 256) is results.all["zero-shot-recent", 5, 0]


def test_what_has_no_seed_is_stacked_on_each() -> None:
    """Fitted on the validation samples of that seed."""
    test, seeds = scored(), []
    one = finished(test, "share-recent", 5, 0, 1.0, seeds=1)
    one = [dataclasses.replace(run, cell=dataclasses.replace(run.cell, seed=None)) for run in one]
    runs = one + finished(test, "DIN", None, None, 1.0)

    def valid(seed: int) -> np.ndarray:
        seeds.append(seed)
        return test.rows[::2]

    results = Results(runs, test, valid)
    both, alone = results.stacked(results.all["share-recent", 5, 0], results.all["DIN", None, None])
    assert both.shape == alone.shape == (2, len(test.rows))
    assert seeds == [0, 1]


def test_differences_draw_whole_users() -> None:
    test = scored()
    results = results_of(finished(test, "rella", 5, 256, 0.5) + finished(test, "rella", 10, 256, 1.0), test)
    one, other = (results.all["rella", k, 256] for k in (5, 10))
    both = one.probabilities, other.probabilities
    assert results.compare(one, other) == paired_bootstrap(test.labels, *both, test.users)


def test_the_best_classical_model_is_chosen_on_validation_samples() -> None:
    test = scored()
    runs = finished(test, "DIN", None, None, 0.5) + finished(test, "SIM", None, None, 2.0)
    runs = [dataclasses.replace(run, validation=1 - run.validation / 4) for run in runs]
    best = results_of(runs, test).best_classical(None)
    assert best is not None
    assert best.method == "DIN"  # although the other is better on the test samples
    assert results_of(runs, test).best_classical(256) is None


def verdicts(results: Results) -> list[str]:
    return [verdict for _, verdict, _ in targets.verdicts(results)]


def test_targets_follow_from_the_numbers() -> None:
    test = scored()
    strengths = {"zero-shot-recent": 0.2, "zero-shot-retrieved": 0.6, "lora-recent": 0.8}
    strengths |= {"lora-retrieved": 1.2, "rella": 1.6, "rellax": 2.4}
    runs = []
    for method, strength in strengths.items():
        for k in (5, 10, 30):
            shots = 0 if method.startswith("zero") else 256
            runs += finished(test, method, k, shots, strength, seeds=2 if shots else 1)
    runs += finished(test, "DIN", None, None, 1.8)
    assert verdicts(results_of(runs, test)) == ["met"] * 6 + ["not run"] * 2

    # One K at which retrieval is behind, long histories that harm, a stronger classical model: missed.
    others = [run for run in runs if (run.cell.method, run.cell.k) != ("lora-retrieved", 30)]
    others += finished(test, "lora-retrieved", 30, 256, 0.3)
    others = [run for run in others if (run.cell.method, run.cell.k) != ("rellax", 30)]
    others += finished(test, "rellax", 30, 256, 0.5) + finished(test, "SIM", None, None, 4.0)
    assert verdicts(results_of(others, test)) == [
        "met",
        "missed",
        "missed",
        "met",
        "met",
        "missed",
        "not run",
        "not run",
    ]
    assert verdicts(results_of(finished(test, "DIN", None, None, 1.0), test)) == ["not run"] * 8
    boosted = finished(test, "rellax-boosted", 5, 256, 5.0)
    assert verdicts(results_of(others + boosted, test))[-2:] == ["met", "met"]
    noise, weaker = (finished(test, "rellax-boosted", 5, 256, strength) for strength in (0.0, 1.5))
    assert verdicts(results_of(runs + noise, test))[-2:] == ["missed", "missed"]
    assert verdicts(results_of(runs + weaker, test))[-2:] == ["missed", "met"]  # it knows something else

    # Fewer behaviours than 10 and more shots than are few decide nothing; each number of shots does.
    small = [run for run in runs if (run.cell.method, run.cell.k) != ("lora-retrieved", 5)]
    small += finished(test, "lora-retrieved", 5, 256, 0.1) + finished(test, "rellax", 5, 16384, 9.0)
    small += finished(test, "SIM", None, None, 4.0)
    assert verdicts(results_of(small, test))[1] == "met"
    assert verdicts(results_of(small, test))[5] == "missed"
    behind = finished(test, "lora-recent", 10, 128, 2.0) + finished(test, "lora-retrieved", 10, 128, 0.5)
    assert verdicts(results_of(runs + behind, test))[1] == "missed"

    # The same strength is no evidence.
    even = [run for run in runs if run.cell.method != "rellax"]
    even += [run for k in (5, 10, 30) for run in finished(test, "rellax", k, 256, 1.6)]
    assert verdicts(results_of(even, test))[3] == "missed"

    # A gain or a loss that chance would bring as well is neither met nor missed.
    even = [run for run in even if run.cell.method != "DIN"] + finished(test, "DIN", None, None, 1.6)
    assert verdicts(results_of(even, test))[2] == verdicts(results_of(even, test))[5] == "level"


def test_the_command_of_a_report() -> None:
    config = StudyConfig(k=[10], shots=[256, 512], seeds=(0, 1, 2), lr=0.002, recent_share=0.3)
    expected = "rellax reproduce --lr 0.002 --recent-share 0.3 --k 10 --shots 256 512"
    assert report._command(config) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2, "1 min"), (600, "10 min"), (7800, "2 h 10 min"), (270000, "3 days 3 h")],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
