"""The predictor of a service: mixed users, histories in the request, threads that share batches."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from raw_data import random_interactions, write_ml_100k
from workspace import GATED, ITEMS, USERS, Workspace, make_model

import rellax.ctr
from rellax.ctr import predictor as module
from rellax.ctr.config import CRMConfig
from rellax.ctr.crm import train_crm
from rellax.ctr.dataset import WORDING, Dataset
from rellax.ctr.evaluate import calibrate, evaluate
from rellax.ctr.predictions import Predictions
from rellax.ctr.predictor import Predictor
from rellax.ctr.prepare import prepare
from rellax.ctr.requests import Requests
from rellax.ctr.retrieval import retrieve
from rellax.ctr.sources import read_ml_100k, read_own
from rellax.ctr.task import Examples
from rellax.ctr.train import train
from rellax.errors import InputError
from rellax.subr import save_embeddings

ROUNDING = 2e-6  # of fp32, where other rows share the batch


@pytest.fixture(scope="module")
def run(workspace: Workspace) -> Path:
    folder = workspace.root / "served"
    config = workspace.config(stage="joint", epochs=1, **GATED, crm_logit=True, recent_share=0.4)
    train(config, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run)


@pytest.fixture(scope="module")
def dataset(workspace: Workspace) -> Dataset:
    return Dataset.load(workspace.data)


def pairs(dataset: Dataset) -> list[dict[str, Any]]:
    """A row for each user, with differing items."""
    users, items = (dataset.users["user_id"].to_pylist(), dataset.items["item_id"].to_pylist())
    return [{"user_id": user, "item_id": items[3 * n % len(items)]} for n, user in enumerate(users)]


def history(dataset: Dataset, user: int, *, until: int | None = None) -> list[dict[str, Any]]:
    rows = range(*dataset.offsets[user : user + 2].tolist())
    items = dataset.items["item_id"].to_pylist()
    found = [
        {
            "item_id": items[dataset.behaviour_items[row]],
            "rating": float(dataset.behaviour_ratings[row]),
            "time": int(dataset.behaviour_times[row]),
        }
        for row in rows
    ]
    return found[:until]


def person(dataset: Dataset, user: int) -> dict[str, str]:
    names = ("profile", *dataset.meta["features"]["user"])
    return {name: dataset.users[name][user].as_py() for name in names}


def test_a_batch_of_mixed_users(predictor: Predictor, dataset: Dataset) -> None:
    rows = pairs(dataset)
    found = predictor.predict(rows)
    assert found.shape == (len(rows),)
    assert found.dtype == np.float64
    assert found.std() > 1e-3
    alone = [predictor.predict([row])[0] for row in rows]
    assert found == pytest.approx(alone, abs=ROUNDING)
    assert predictor.predict(rows[::-1])[::-1] == pytest.approx(found, abs=ROUNDING)
    assert len(predictor.predict([])) == 0
    # As numbers, in any mapping, and several items of one user: the history is read once.
    numbers = [{"user_id": int(rows[2]["user_id"]), "item_id": int(row["item_id"])} for row in rows]
    assert predictor.predict(iter(numbers))[2] == pytest.approx(found[2], abs=ROUNDING)
    assert len(predictor._requests.dataset([predictor._requests.read(row) for row in numbers]).offsets) == 2


def test_a_new_user_with_a_known_ones_history_gets_their_probability(
    predictor: Predictor, dataset: Dataset
) -> None:
    rows = pairs(dataset)
    new = [
        {"item_id": row["item_id"], "history": history(dataset, user)[::-1], "user": person(dataset, user)}
        for user, row in enumerate(rows)
    ]
    expected = predictor.predict(rows)
    assert predictor.predict(new) == pytest.approx(expected, abs=ROUNDING)
    named = [row | {"user_id": f"new {n}"} for n, row in enumerate(new)]
    mixed = predictor.predict([*rows, *named])
    assert mixed == pytest.approx([*expected, *expected], abs=ROUNDING)
    # Only what is before a time counts.
    moment = new[3]["history"][7]["time"]
    one, two = predictor.predict([rows[3] | {"time": moment}, named[3] | {"time": moment}])
    assert one == pytest.approx(two, abs=ROUNDING)
    assert abs(one - expected[3]) > 1e-5


def test_behaviours_in_a_request_are_added_to_what_is_known(predictor: Predictor, dataset: Dataset) -> None:
    row = pairs(dataset)[3]
    (known,) = predictor.predict([row])
    again = row | {"history": history(dataset, 3)[3:9]}
    assert predictor.predict([again]) == pytest.approx([known], abs=ROUNDING)
    newer = {"item_id": row["item_id"], "rating": 1, "time": 10**9}  # the nearest there can be
    (changed,) = predictor.predict([row | {"history": [newer]}])
    assert abs(changed - known) > 1e-5
    whole = {"item_id": row["item_id"], "history": [newer, *history(dataset, 3)], "user": person(dataset, 3)}
    assert predictor.predict([whole]) == pytest.approx([changed], abs=ROUNDING)
    early = row | {"history": [newer], "time": 10**9}
    assert predictor.predict([early]) == pytest.approx([known], abs=ROUNDING)
    # Numbers of NumPy's are numbers, as those of a data frame's rows.
    numpys = newer | {"rating": np.int64(1), "time": np.int64(10**9)}
    assert predictor.predict([row | {"history": [numpys]}]) == pytest.approx([changed], abs=ROUNDING)
    # Items that the data do not know cannot be read by anything, and do not count.
    strange = row | {"history": [{"item_id": "none such", "rating": 1, "time": 10**9}]}
    assert predictor.predict([strange]) == pytest.approx([known], abs=ROUNDING)


def test_what_is_not_told_of_a_new_user_is_what_most_have(predictor: Predictor, dataset: Dataset) -> None:
    row = {"item_id": "4", "history": history(dataset, 2)}
    names = dataset.meta["features"]["user"]
    usual = {
        name: max(sorted(set(values := dataset.users[name].to_pylist())), key=values.count) for name in names
    }
    some = predictor.predict([row, row | {"user": usual}, row | {"user": {names[0]: "none such"}}])
    assert some == pytest.approx([some[0]] * 3, abs=ROUNDING)
    assert abs(predictor.predict([row | {"user": {"profile": "woman, 99"}}])[0] - some[0]) > 1e-6


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"item_id": "4"}, "expected a value of user_id, found none"),
        ("user_id", "expected an object with user_id and item_id, found 'user_id'"),
        ({"user_id": "3", "item_id": ""}, "expected a value of item_id, found none"),
        ({"user_id": True, "item_id": 4}, "expected user_id as text or a whole number, found True"),
        (
            {"user_id": "99", "item_id": "4"},
            "user_id '99' is not in the data, expected one that is, or a history",
        ),
        ({"user_id": "3", "item_id": "x"}, "item_id 'x' is not in the data"),
        ({"user_id": "3", "item_id": "4", "time": "now"}, "expected time as a number, found 'now'"),
        (
            {"user_id": "3", "item_id": "4", "time": 2**63},
            "expected time as a number, found 9223372036",
        ),
        (
            {"user_id": "3", "item_id": "4", "time": 0},
            "expected a user with behaviours before that time.*'3'",
        ),
        ({"item_id": "4", "history": []}, "expected a user with behaviours, found none$"),
        (
            {"item_id": "4", "history": [{"item_id": "none such", "rating": 1, "time": 1}]},
            "expected a history with items that are in the data, found none of them$",
        ),
        ({"item_id": "4", "history": "4"}, "expected history as a list of behaviours, found '4'"),
        ({"item_id": "4", "history": [4]}, r"history\[0\]: expected an object, found 4"),
        ({"item_id": "4", "history": [{}]}, r"history\[0\]: expected a value of item_id, found none"),
        (
            {"item_id": "4", "history": [{"item_id": 2, "rating": 7, "time": 1}]},
            r"history\[0\]: expected a rating of the data, 1, 2, 3, 4, 5, found 7",
        ),
        (
            {"item_id": "4", "history": [{"item_id": 2, "rating": 1}]},
            r"history\[0\]: expected a value of time, found none",
        ),
        (
            {"item_id": "4", "history": [{"item_id": 2, "rating": np.True_, "time": 1}]},
            r"history\[0\]: expected a rating of the data, 1, 2, 3, 4, 5, found .*True",
        ),
        (
            {"item_id": "4", "history": [{"item_id": 2, "rating": 1, "time": 1}], "user": {"shoe": 44}},
            "expected user as an object of profile, .*, found {'shoe': 44}",
        ),
        (
            {
                "item_id": "4",
                "history": [{"item_id": 2, "rating": 1, "time": 1}],
                "user": {"profile": "\ud83d"},
            },
            r"expected profile of user as Unicode, found '\\ud83d'",
        ),
    ],
)
def test_rows_that_cannot_be_answered(predictor: Predictor, row: dict[str, Any], words: str) -> None:
    good = {"user_id": 3, "item_id": 4}
    with pytest.raises(InputError, match=rf"^rows\[1\]: {words}"):
        predictor.predict([good, row, row])
    one, two, three = predictor.predict_each([good, row, good])
    assert one == pytest.approx(three, abs=ROUNDING)
    assert isinstance(two, InputError)


def test_a_behaviour_without_a_rating(dataset: Dataset) -> None:
    """Is one of those that mean that there is none, where the data have that."""
    row = {"item_id": "4", "history": [{"item_id": 2, "time": 1}]}
    with pytest.raises(InputError, match=r"^history\[0\]: expected a rating of the data, .*, found None$"):
        Requests(dataset).read(row)
    meta = dataset.meta | {"unrated": 3.0}
    found = Requests(dataclasses.replace(dataset, meta=meta)).read(row)
    assert found.history is not None
    assert [part.tolist() for part in found.history] == [[1], [3.0]]


def test_a_prompt_that_is_too_long(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor._task.prompts, "max_tokens", 5)
    (answer,) = predictor.predict_each([{"user_id": 3, "item_id": 4}])
    assert "max_tokens: " in str(answer)
    with pytest.raises(InputError, match=r"rows\[0\]: max_tokens: "):
        predictor.predict([{"user_id": 3, "item_id": 4}])


def test_threads_get_what_they_would_get_alone(run: Path, predictor: Predictor, dataset: Dataset) -> None:
    """Each on its own the same bits; where batches are shared, all but rounding."""
    requests = [pairs(dataset)[n : n + 1 + n % 3] for n in range(10)] * 4
    serial = [predictor.predict(rows) for rows in requests]
    exact = Predictor(run, share_batches=False)
    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(exact.predict, requests), serial, strict=True):
            assert found.tolist() == expected.tolist()
        for found, expected in zip(pool.map(predictor.predict, requests), serial, strict=True):
            assert found == pytest.approx(expected, abs=ROUNDING)


def test_requests_that_wait_share_a_batch(
    predictor: Predictor, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    score = module.predict_probabilities

    def scored(model: Any, collator: Any, examples: Any, **options: Any) -> np.ndarray:
        sizes.append(len(examples))
        if sizes == [16]:
            raise RuntimeError("out of memory")
        return score(model, collator, examples, **options)

    monkeypatch.setattr(module, "predict_probabilities", scored)
    row = pairs(dataset)[1]
    requests = [[row] * 5] * 3 + [[row]] * 2 + [[row] * 40]
    with ThreadPoolExecutor(8) as pool:
        free = threading.Event()
        predictor._worker.submit(free.wait)
        waiting = []
        for number, rows in enumerate(requests, start=1):  # one after another: the order decides
            waiting.append(pool.submit(predictor.predict, rows))
            while len(predictor._waiting) < number:
                time.sleep(0.001)
        free.set()
        failed, served = waiting[:4], waiting[4:]
        for future in failed:  # 5 + 5 + 5 + 1 rows are one batch, and what breaks it reaches all who asked
            with pytest.raises(RuntimeError, match="out of memory"):
                future.result()
        assert [len(future.result()) for future in served] == [1, 40]
    assert sizes == [16, 1, 40]


def test_what_nobody_waits_for_is_not_computed(
    predictor: Predictor, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the first batch: the others do not follow, and later requests are answered."""
    seen: list[int] = []
    result, cancel = Future.result, Future.cancel
    computed, cancelled = threading.Event(), threading.Event()

    def interrupted(future: Any, timeout: float | None = None) -> Any:
        assert computed.wait(300)
        raise KeyboardInterrupt

    def cancelling(future: Any) -> bool:
        found = cancel(future)
        cancelled.set()
        return found

    def done(rows: int) -> None:
        seen.append(rows)
        computed.set()
        assert cancelled.wait(300)

    rows = pairs(dataset) * 10
    monkeypatch.setattr(Future, "result", interrupted)
    monkeypatch.setattr(Future, "cancel", cancelling)
    with pytest.raises(KeyboardInterrupt):
        predictor.predict(rows, done=done)
    monkeypatch.setattr(Future, "result", result)
    assert len(predictor.predict(rows[:1])) == 1
    assert len(seen) == 1 < len(rows) / predictor.batch_size


def test_the_worker_ends_with_its_predictor(run: Path) -> None:
    def workers() -> int:
        gc.collect()
        return sum(thread.name.startswith("rellax-predictor") for thread in threading.enumerate())

    before = workers()
    predictor = Predictor(run)
    assert workers() == before + 1
    (thread,) = predictor._worker._threads
    del predictor
    gc.collect()
    thread.join(300)
    assert workers() == before


def test_a_run_stacked_on_another_classical_model_than_its_gates_read(
    run: Path, workspace: Workspace, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has that model's answer, also after one whose prompt cannot be made."""
    stacked, crm = shutil.copytree(run, tmp_path / "run"), tmp_path / "deepfm"
    train_crm(dataset, crm, CRMConfig("DeepFM", embedding_dim=4, hidden=(6,), epochs=1))
    calibrate(stacked, crm=crm)
    few, samples = dataset.indices("test")[:3], dataset.samples
    users, items = dataset.users["user_id"].to_pylist(), dataset.items["item_id"].to_pylist()
    rows = [
        {
            "user_id": users[samples.user[sample]],
            "item_id": items[samples.item[sample]],
            "time": int(dataset.behaviour_times[dataset.history(sample).stop]),
        }
        for sample in few
    ]
    alone = Predictor(stacked, calibrated=False).predict(rows)
    predictor = Predictor(stacked)
    said, gates = (Predictions.read(folder).at(few).probabilities for folder in (crm, workspace.crm))
    expected = predictor.calibration.apply(alone, said)
    assert predictor.predict(rows) == pytest.approx(expected, abs=ROUNDING)
    assert abs(predictor.calibration.apply(alone, gates) - expected).max() > 100 * ROUNDING
    made = Examples.__getitem__

    def make(examples: Examples, row: Any) -> Any:
        if row == 0:
            raise InputError("max_tokens: too few")
        return made(examples, row)

    monkeypatch.setattr(Examples, "__getitem__", make)
    first, *others = predictor.predict_each(rows)
    assert isinstance(first, InputError)
    assert others == pytest.approx(expected[1:], abs=ROUNDING)


@pytest.mark.parametrize("part", ["crm", "embeddings"])
def test_what_a_run_read_must_be_there_as_it_was(run: Path, workspace: Workspace, part: str) -> None:
    """Another CRM or other embeddings fit in shape, and would give other answers."""
    file = getattr(workspace, part) / {"crm": "model", "embeddings": "embeddings"}[part]
    file = file.with_suffix(".safetensors")
    known = file.read_bytes()
    try:
        file.write_bytes(known[:-4] + bytes(4))
        with pytest.raises(InputError, match=f"{file.name}: expected the file that the run was trained with"):
            Predictor(run)
    finally:
        file.write_bytes(known)
    Predictor(run)


@pytest.mark.parametrize("own", ["there", "changed", "gone"])
def test_other_items_are_noticed(run: Path, workspace: Workspace, tmp_path: Path, own: str) -> None:
    """An item more, and the rows of those after it are other ones; a newer title is none of that."""
    served, path = tmp_path / "run", tmp_path / "own" / "items.parquet"
    shutil.copytree(run, served)
    shutil.copytree(workspace.data, path.parent)
    config = json.loads((served / "config.json").read_text())
    config["data"] = str(path.parent)
    (served / "config.json").write_text(json.dumps(config))
    shutil.copytree(workspace.data, tmp_path / "newer")
    Predictor(served, data=tmp_path / "newer")
    items = pq.read_table(path)
    ids = items["item_id"].to_pylist()
    others = items.set_column(1, "item_id", pa.array(ids[::-1]))
    renamed = items.set_column(2, "title", items["text"])
    if own == "changed":
        pq.write_table(others, path)
        with pytest.raises(InputError, match="own: expected the items that the run was trained with, found"):
            Predictor(served)
    if own == "gone":
        shutil.rmtree(path.parent)
    pq.write_table(others, tmp_path / "newer" / "items.parquet")
    with pytest.raises(InputError, match="newer: expected the items that the run was trained with, found"):
        Predictor(served, data=tmp_path / "newer")
    if own == "there":
        pq.write_table(renamed, tmp_path / "newer" / "items.parquet")
        Predictor(served, data=tmp_path / "newer")


@pytest.mark.parametrize("kind", ["all parts", "boosted"])
def test_it_says_what_evaluation_says(
    run: Path, workspace: Workspace, dataset: Dataset, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "run"
    if kind == "all parts":
        shutil.copytree(run, folder)
    else:
        config = workspace.config(prompts="recent", epochs=1, crm_logit=True)
        train(config, folder, progress=False)
    evaluate(folder, progress=False)
    known = Predictions.read(folder / "test")
    samples = dataset.samples
    users, items = dataset.users["user_id"].to_pylist(), dataset.items["item_id"].to_pylist()
    rows = [
        {
            "user_id": users[samples.user[sample]],
            "item_id": items[samples.item[sample]],
            "time": int(dataset.behaviour_times[dataset.history(sample).stop]),
        }
        for sample in known.samples
    ]
    requests = Requests(dataset)
    alike = [
        requests.read(row).position == samples.position[at]
        for row, at in zip(rows, known.samples, strict=True)
    ]
    assert sum(alike) > 5  # the others did something at the very time
    found = Predictor(folder).predict(rows)
    assert found[alike] == pytest.approx(known.probabilities[alike], abs=ROUNDING)


@pytest.mark.parametrize(
    ("parts", "stacked"),
    [
        ({"stage": "joint", "soft_prompt": True}, False),
        ({"stage": "joint", "interaction": "full"}, False),
        ({"crm_logit": True}, False),
        ({}, True),
    ],
    ids=["soft prompt", "gates", "boosted", "stacked"],
)
def test_whatever_goes_by_the_rows_of_items_needs_the_same(
    workspace: Workspace, tmp_path: Path, parts: dict[str, Any], stacked: bool
) -> None:
    folder, data = tmp_path / "run", shutil.copytree(workspace.data, tmp_path / "data")
    train(workspace.config(prompts="recent", epochs=1, **parts), folder, progress=False)
    if stacked:
        calibrate(folder, crm=workspace.crm)
    Predictor(folder, data=data)
    items = pq.read_table(data / "items.parquet")
    others = items.set_column(1, "item_id", pa.array(items["item_id"].to_pylist()[::-1]))
    pq.write_table(others, data / "items.parquet")
    with pytest.raises(
        InputError, match="data: expected the items that the run was trained with, found others"
    ):
        Predictor(folder, data=data)


def test_it_is_found_where_one_would_look() -> None:
    assert rellax.ctr.Predictor is Predictor
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        _ = rellax.ctr.Predicter
    for wrong in (0, "16", 1.5, True):
        with pytest.raises(InputError, match=f"batch_size: expected a whole number, .*, got {wrong!r}$"):
            Predictor("x", batch_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (5, "5"),
        (None, "None"),
        ("rows", "'rows'"),
        ({"user_id": 3, "item_id": 4}, "{'user_id': 3, 'item_id': 4}"),
        (pandas.DataFrame({"user_id": [3], "item_id": [4]}), "a DataFrame"),
        (pa.table({"user_id": [3], "item_id": [4]}), "a Table"),
    ],
    ids=["number", "none", "text", "object", "frame", "table"],
)
def test_what_is_no_list_of_rows(predictor: Predictor, rows: Any, words: str) -> None:
    for ask in (predictor.predict, predictor.predict_each):
        with pytest.raises(InputError, match=f"^rows: expected a list of objects, got {words}$"):
            ask(rows)


def test_a_forked_process_is_told_to_make_its_own(predictor: Predictor, dataset: Dataset) -> None:
    """The thread that computes is in the parent alone: without a word the child would wait for ever."""
    source, sink = os.pipe()
    if (child := os.fork()) == 0:
        try:
            signal.alarm(20)
            predictor.predict(pairs(dataset)[:1])
        except InputError as error:
            os.write(sink, str(error).encode())
        finally:
            os._exit(0)
    os.close(sink)
    with os.fdopen(source) as told:
        assert told.read() == (
            "Predictor: expected the process that made it, found a child of that; make one in each worker"
        )
    os.waitpid(child, 0)
    assert len(predictor.predict(pairs(dataset)[:1])) == 1


def test_an_error_shows_the_beginning_of_what_came(predictor: Predictor) -> None:
    long, good = "9" * 10**6, {"user_id": 3, "item_id": 4}
    behaviour = {"item_id": 2, "rating": 1, "time": 1}
    wrong = [
        long,
        good | {"user_id": long},
        good | {"item_id": long},
        good | {"item_id": [long]},
        good | {"time": long},
        good | {"history": long},
        good | {"history": [long]},
        good | {"history": [behaviour | {"rating": long}]},
        good | {"history": [behaviour], "user_id": None, "user": long},
        good | {"history": [behaviour], "user_id": None, "user": {"profile": long + "\ud83d"}},
        good | {"history": [], "user_id": long},
    ]
    for error in predictor.predict_each(wrong):  # type: ignore[arg-type]
        assert isinstance(error, InputError)
        assert "9999999999" in str(error)
        assert len(str(error)) < 250


@pytest.mark.parametrize("none", [None, math.nan, pandas.NaT, pandas.NA, np.datetime64("NaT")], ids=repr)
def test_what_pandas_has_for_none_is_none(predictor: Predictor, none: Any) -> None:
    row = {"user_id": 3, "item_id": 4}
    expected = predictor.predict([row])
    assert (
        predictor.predict([row | {"time": none, "history": none, "user": none}]).tolist() == expected.tolist()
    )
    for name in row:
        with pytest.raises(InputError, match=f"expected a value of {name}, found none"):
            predictor.predict([row | {name: none}])
    with pytest.raises(InputError, match=r"history\[0\]: expected a value of time, found none"):
        predictor.predict([row | {"history": [{"item_id": 2, "rating": 1, "time": none}]}])


def test_a_changed_wording_is_refused(run: Path, workspace: Workspace, tmp_path: Path) -> None:
    """The adapter has learnt the question as it was put; a run of an earlier version does not know how."""
    served, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run, served)
    shutil.copytree(workspace.data, data)
    meta = json.loads((data / "dataset.json").read_text())
    known = {name: meta.get(name) for name in WORDING}
    (served / "wording.json").write_text(json.dumps(known))
    Predictor(served, data=data)
    (data / "dataset.json").write_text(json.dumps(meta | {"item_noun": "book", "positive_above": 2}))
    found = (
        "data: .* wording .*, found item_noun 'book' in the place of 'film', positive_above 2 in the place"
    )
    with pytest.raises(InputError, match=found):
        Predictor(served, data=data)
    (served / "wording.json").unlink()
    Predictor(served, data=data)


def test_new_items_need_a_run_of_their_own(workspace: Workspace, tmp_path: Path) -> None:
    """Where embeddings alone tell: made anew, as the advice was, they are those of no run."""
    config = workspace.config(crm=None, epochs=1)
    train(config, tmp_path / "run", progress=False)
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "items.parquet"
    items = pq.read_table(path)
    renamed = pa.array([f"{name} new" for name in items["item_id"].to_pylist()])
    pq.write_table(items.set_column(items.column_names.index("item_id"), "item_id", renamed), path)
    with pytest.raises(InputError, match="a run knows the items that it was trained with, new ones need"):
        Predictor(tmp_path / "run", data=tmp_path / "data")


def test_empty_histories_where_the_run_was_trained_on_them(tmp_path: Path) -> None:
    raw = write_ml_100k(tmp_path / "raw", random_interactions(USERS, ITEMS, 4, seed=0), USERS, ITEMS)
    source = read_ml_100k(raw)
    row = {"user_id": 3, "item_id": 4, "time": 0}
    prepare(source, tmp_path / "one", min_history=1)
    with pytest.raises(InputError, match="expected a user with behaviours before that time, found none"):
        Requests(Dataset.load(tmp_path / "one")).read(row)
    work = Workspace(tmp_path)
    prepare(source, work.data, min_history=0)
    dataset = Dataset.load(work.data)
    make_model(work.model, dataset)
    train_crm(dataset, work.crm, CRMConfig(embedding_dim=4, hidden=(8, 6), epochs=1, max_len=6))
    save_embeddings(work.embeddings, torch.randn(ITEMS, 8), dataset.items["item_id"].to_pylist(), "random")
    retrieve({"data": str(work.data), "embeddings": str(work.embeddings), "k": 4}, work.retrieved)
    train(work.config(stage="joint", epochs=1, **GATED, crm_logit=True), tmp_path / "run", progress=False)
    predictor = Predictor(tmp_path / "run")
    user = person(dataset, dataset.users["user_id"].to_pylist().index("3"))
    new = {"item_id": 4, "history": [], "user": user}
    (alone,) = predictor.predict([row])
    found = predictor.predict([row, new, row | {"time": None}])
    assert found[:2] == pytest.approx([alone, alone], abs=ROUNDING)
    assert abs(found[2] - alone) > 1e-5


def test_dates_and_missing_times(tmp_path: Path) -> None:
    """In the unit that preparing made of own data's dates; without times, histories have their own order."""
    events = [(u, i, i % 2, f"2026-01-{i + 1:02}T0{u}:00:00") for u in range(3) for i in range(8)]
    lines = ["who,what,bought,moment", *(f"{u},{i},{bought},{moment}" for u, i, bought, moment in events)]
    (tmp_path / "clicks.csv").write_text("\n".join(lines) + "\n")
    interactions = {"file": "clicks.csv", "user": "who", "item": "what", "label": "bought", "time": "moment"}
    column_map = {
        "name": "clicks",
        "item_noun": "article",
        "interactions": interactions,
        "items": {"item": "what", "title": "what"},
    }

    def requests(name: str, **changes: Any) -> Requests:
        write_map = column_map | {"interactions": {**interactions, **changes}}
        if changes:
            del write_map["interactions"]["time"]  # type: ignore[attr-defined]
        (tmp_path / "map.json").write_text(json.dumps(write_map))
        prepare(read_own(tmp_path / "map.json"), tmp_path / name, split=(1, 1, 1))
        return Requests(Dataset.load(tmp_path / name))

    dated = requests("dated")
    for moment in ("2026-01-04T01:00:00", "2026-01-04T02:00:00+01:00", "2026-01-04 01:00:00Z", 1767488400000):
        assert dated.read({"user_id": 1, "item_id": 5, "time": moment}).position == 3
    assert dated.read({"user_id": 1, "item_id": 5, "time": "2026-01-04"}).position == 3
    for wrong in ("May", math.inf):
        with pytest.raises(InputError, match=f"as a date, or milliseconds since 1970, found {wrong!r}"):
            dated.read({"user_id": 1, "item_id": 5, "time": wrong})
    for cut in (1767488400000.9, "1767488400000.9", np.float64(1767488400000.9)):
        assert dated.read({"user_id": 1, "item_id": 5, "time": cut}).position == 3
    for unit in ("ms", "ns", "D"):
        moment = np.datetime64("2026-01-04T01:00:00", unit) if unit != "D" else np.datetime64("2026-01-05")
        expected = 3 if unit != "D" else 4
        assert dated.read({"user_id": 1, "item_id": 5, "time": moment}).position == expected
    added = dated.read(
        {"user_id": 1, "item_id": 5, "history": [{"item_id": 7, "rating": True, "time": "2026-01-01"}]}
    )
    assert added.history is not None
    assert added.history[0].tolist() == [7, 0, 1, 2, 3, 4, 5, 6, 7]

    timeless = requests("timeless", delimiter=",")
    added = timeless.read(
        {"user_id": 1, "item_id": 5, "history": [{"item_id": n, "rating": 0} for n in (4, 2)]}
    )
    assert added.history is not None
    assert added.history[0].tolist()[-2:] == [4, 2]
    assert sorted(added.history[0].tolist()) == list(range(8))  # what is known already counts once
    again = timeless.read(
        {"item_id": 5, "history": [{"item_id": n, "rating": r} for n, r in ((4, 1), (2, 0), (4, 0))]}
    )
    assert again.history is not None
    assert [part.tolist() for part in again.history] == [[2, 4], [0, 0]]
    with pytest.raises(InputError, match=r"expected no time, the data in .* have no times"):
        timeless.read({"user_id": 1, "item_id": 5, "time": 4})


def test_behaviours_in_a_request_stand_where_preparing_would_put_them(tmp_path: Path) -> None:
    """Of one time in the order of their items' ids; what is there already counts once."""
    known = [(u, i, i % 2, 10 + i // 4) for u in range(3) for i in (0, 1, 2, 4, 6, 7, 8, 9)]
    known += [(0, 3, 1, 10), (0, 5, 1, 11)]
    new = [(1, 9, 0, 11), (1, 5, 1, 11), (1, 3, 1, 10)]
    column_map = {
        "name": "clicks",
        "item_noun": "article",
        "interactions": {"file": "it.csv", "user": "who", "item": "what", "label": "bought", "time": "when"},
        "items": {"item": "what", "title": "what"},
    }
    (tmp_path / "map.json").write_text(json.dumps(column_map))

    def prepared(name: str, events: list[tuple[int, ...]]) -> Dataset:
        lines = ["who,what,bought,when", *(",".join(map(str, event)) for event in events)]
        (tmp_path / "it.csv").write_text("\n".join(lines) + "\n")
        prepare(read_own(tmp_path / "map.json"), tmp_path / name, split=(1, 1, 1))
        return Dataset.load(tmp_path / name)

    whole, requests = prepared("whole", known + new), Requests(prepared("known", known))
    again = [(1, 4, 0, 11), (1, 7, 1, 11)]
    history = [{"item_id": i, "rating": rating, "time": time} for _, i, rating, time in again + new]
    row = {"user_id": 1, "item_id": 8, "history": history}
    start, end = whole.offsets[1:3]
    times = whole.behaviour_times[start:end]
    for more, count in (
        ({}, end - start),
        ({"time": 11}, (times < 11).sum()),
        ({"time": 12}, (times < 12).sum()),
    ):
        found = requests.read(row | more)
        assert found.history is not None
        assert found.position == count
        for values, expected in zip(
            found.history, (whole.behaviour_items, whole.behaviour_ratings), strict=True
        ):
            assert values.tolist() == expected[start:end][:count].tolist()
