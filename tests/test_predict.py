"""Prediction: new rows get what evaluation gives known ones, from nothing but earlier behaviours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from workspace import GATED, Workspace

from rellax.ctr.dataset import Dataset
from rellax.ctr.evaluate import evaluate
from rellax.ctr.predict import predict
from rellax.ctr.train import train
from rellax.errors import InputError


@pytest.fixture(scope="module")
def run(workspace: Workspace) -> Path:
    folder = workspace.root / "predicting"
    train(workspace.config(stage="joint", epochs=1, **GATED), folder, progress=False)
    evaluate(folder, progress=False)
    return folder


def raw_rows(dataset: Dataset, samples: np.ndarray) -> pa.Table:
    """Known samples as a user would ask for them."""
    s = dataset.samples
    return pa.table(
        {
            "item_id": dataset.items["item_id"].take(pa.array(s.item[samples])),
            "user_id": dataset.users["user_id"].take(pa.array(s.user[samples])),
            "time": times(dataset)[samples],
        }
    )


def times(dataset: Dataset) -> np.ndarray:
    """The time of each sample."""
    return dataset.behaviour_times[dataset.offsets[dataset.samples.user] + dataset.samples.position]


def unique_times(dataset: Dataset) -> np.ndarray:
    """Test samples whose user did nothing else at that time: their history is all that came before them."""
    s, chosen = dataset.samples, []
    for sample in dataset.indices("test"):
        start, end = dataset.offsets[s.user[sample]], dataset.offsets[s.user[sample] + 1]
        if (dataset.behaviour_times[start:end] == times(dataset)[sample]).sum() == 1:
            chosen.append(sample)
    return np.array(chosen)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_known_samples_get_what_evaluation_gave(
    workspace: Workspace, run: Path, tmp_path: Path, suffix: str
) -> None:
    dataset = Dataset.load(workspace.data)
    chosen = unique_times(dataset)[::-1]
    assert len(chosen) > 5
    table = raw_rows(dataset, chosen).append_column("note", pa.array([f"n{i}" for i in chosen]))
    path, out = tmp_path / f"new{suffix}", tmp_path / f"out{suffix}"
    (pa.csv.write_csv if suffix == ".csv" else pq.write_table)(table, path)
    assert predict(run, path, out, progress=False) == len(chosen)

    found = pa.csv.read_csv(out) if suffix == ".csv" else pq.read_table(out)
    assert found.column_names == ["item_id", "user_id", "time", "note", "probability"]
    assert found["note"].to_pylist() == table["note"].to_pylist()
    known = pq.read_table(run / "test" / "predictions.parquet").to_pylist()
    expected = {row["sample"]: row["probability"] for row in known}
    assert found["probability"].to_pylist() == pytest.approx([expected[i] for i in chosen], abs=2e-6)


def test_behaviours_at_and_after_the_time_are_not_used(
    workspace: Workspace, run: Path, tmp_path: Path
) -> None:
    """Rate everything from the asked time on differently: the probability stays."""
    dataset = Dataset.load(workspace.data)
    table = raw_rows(dataset, unique_times(dataset)[:1])
    pq.write_table(table, tmp_path / "new.parquet")
    time = table["time"][0].as_py()
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "behaviours.parquet"
    behaviours = pq.read_table(path)
    late = behaviours["time"].to_numpy() >= time
    rating = np.where(late, 6 - behaviours["rating"].to_numpy(), behaviours["rating"].to_numpy())
    index = behaviours.column_names.index("rating")
    pq.write_table(behaviours.set_column(index, "rating", pa.array(rating.astype(np.float32))), path)

    assert late.any()
    predict(run, tmp_path / "new.parquet", tmp_path / "a.parquet", progress=False)
    predict(run, tmp_path / "new.parquet", tmp_path / "b.parquet", data=tmp_path / "data", progress=False)
    one, two = (pq.read_table(tmp_path / name)["probability"] for name in ("a.parquet", "b.parquet"))
    assert one.to_pylist() == two.to_pylist()

    # From a later time on those behaviours count, so the test above could have failed.
    later = table.set_column(2, "time", pa.array([10**6]))
    pq.write_table(later, tmp_path / "later.parquet")
    predict(run, tmp_path / "later.parquet", tmp_path / "a.parquet", progress=False)
    predict(run, tmp_path / "later.parquet", tmp_path / "b.parquet", data=tmp_path / "data", progress=False)
    one, two = (pq.read_table(tmp_path / name)["probability"] for name in ("a.parquet", "b.parquet"))
    assert abs(one[0].as_py() - two[0].as_py()) > 1e-5


def test_without_a_time_everything_known_is_history(workspace: Workspace, run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id\n3,4\n5,17\n")
    (tmp_path / "b.csv").write_text("user_id,item_id,time\n3,4,999999\n5,17,999999\n")
    for name in ("a", "b"):
        predict(run, tmp_path / f"{name}.csv", tmp_path / f"{name}.parquet", progress=False)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet")["probability"] for name in ("a", "b"))
    assert one.to_pylist() == two.to_pylist()


def test_a_time_where_the_data_have_none(workspace: Workspace, run: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    path.write_text(path.read_text().replace('"timed": true', '"timed": false'))
    (tmp_path / "new.csv").write_text("user_id,item_id,time\n3,4,5\n")
    with pytest.raises(InputError, match=r"new.csv: expected no column 'time', the data in .* have no times"):
        predict(run, tmp_path / "new.csv", tmp_path / "out.csv", data=tmp_path / "data", progress=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user_id,item_id\n3,4\n99,4\n", r"new.csv, row 2: user_id '99' is not in the data"),
        ("user_id,item_id\n3,x 1\n", r"new.csv, row 1: item_id 'x 1' is not in the data"),
        ("user_id,film\n3,4\n", r"new.csv: expected a column 'item_id', found user_id, film"),
        ("user_id,item_id\n3,\n", r"new.csv, row 1: expected a value of item_id, found none"),
        ("user_id,item_id,time\n3,4,soon\n", r"new.csv: expected a readable table, but .*soon"),
        ("user_id,item_id,time\n3,4,5\n", r"row 1: expected a user with behaviours before that time.*'3'"),
        ("user_id,item_id\n", r"new.csv: expected at least one row, found none"),
        ("user_id,item_id\n3,4,5\n", r"new.csv: expected a readable table"),
        ("user_id,item_id,probability\n3,4,0.5\n", r"new.csv: expected no column 'probability'"),
    ],
    ids=["user", "item", "column", "empty-id", "time", "no-history", "no-rows", "ragged", "twice"],
)
def test_bad_tables(run: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        predict(run, tmp_path / "new.csv", tmp_path / "out.csv", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"user_id": [3.5]}, "expected user_id as string, found double"),
        ({"time": ["1990-01-01"]}, "expected time as int64"),
        ({"time": [None]}, "row 1: expected a value of time, found none"),
    ],
    ids=["float-id", "date", "null"],
)
def test_bad_parquet(run: Path, tmp_path: Path, column: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table({"user_id": [3], "item_id": [4]} | column), tmp_path / "new.parquet")
    with pytest.raises(InputError, match=words):
        predict(run, tmp_path / "new.parquet", tmp_path / "out.csv", progress=False)


def test_bad_paths(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("user_id,item_id\n3,4\n")
    with pytest.raises(InputError, match="expected a table, found none"):
        predict(run, tmp_path / "none.csv", tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"out.txt: expected a file that ends in .csv or .parquet"):
        predict(run, tmp_path / "new.csv", tmp_path / "out.txt")
    with pytest.raises(InputError, match=r"config.json: expected a JSON file, found none"):
        predict(tmp_path, tmp_path / "new.csv", tmp_path / "out.csv")
