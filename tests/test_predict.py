"""Prediction: new rows get what evaluation gives known ones, from nothing but earlier behaviours."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from workspace import GATED, Workspace

from rellax.ctr import predict as predict_module
from rellax.ctr.dataset import Dataset
from rellax.ctr.evaluate import evaluate
from rellax.ctr.predict import predict
from rellax.ctr.train import train
from rellax.errors import InputError


@pytest.fixture(scope="module")
def run(workspace: Workspace) -> Path:
    folder = workspace.root / "predicting"
    train(workspace.config(stage="joint", epochs=1, **GATED, crm_logit=True), folder, progress=False)
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


def write(table: pa.Table, path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        (pa.csv.write_csv if path.suffix == ".csv" else pq.write_table)(table, path)


def read(path: Path) -> pa.Table:
    if path.suffix == ".jsonl":
        return pa.Table.from_pylist([json.loads(line) for line in path.read_text().splitlines()])
    return pa.csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)


@pytest.mark.parametrize("rows", [8192, 3], ids=["one-block", "blocks"])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_known_samples_get_what_evaluation_gave(
    workspace: Workspace,
    run: Path,
    tmp_path: Path,
    suffix: str,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predict_module, "_ROWS", rows)
    monkeypatch.setattr(predict_module, "_BYTES", 40 * rows)
    dataset = Dataset.load(workspace.data)
    chosen = unique_times(dataset)[::-1]
    assert len(chosen) > 5
    table = raw_rows(dataset, chosen).append_column("note", pa.array([f"0{i}" for i in chosen]))
    path, out = tmp_path / f"new{suffix}", tmp_path / f"out{suffix}"
    write(table, path)
    assert predict(run, path, out, progress=False) == len(chosen)

    found = read(out)
    assert found.column_names == ["item_id", "user_id", "time", "note", "probability"]
    if suffix == ".csv":  # what is passed through stays as it was written
        assert [f'"0{i}"' for i in chosen] == [row.split(",")[3] for row in out.read_text().splitlines()[1:]]
    else:
        assert found.drop_columns("probability").to_pylist() == table.to_pylist()
    known = pq.read_table(run / "test" / "predictions.parquet").to_pylist()
    expected = {row["sample"]: row["probability"] for row in known}
    assert found["probability"].to_pylist() == pytest.approx([expected[i] for i in chosen], abs=2e-6)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, out.name}


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


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("user_id,item_id,timestamp", ["new.csv: no column 'time', so every row is answered from all that"]),
        ("user_id,item_id,time", []),
    ],
)
def test_a_table_without_a_column_of_times_is_told_once(
    run: Path,
    tmp_path: Path,
    header: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(predict_module, "_ROWS", 1)
    caplog.set_level("INFO", "rellax.ctr.predict")
    (tmp_path / "new.csv").write_text(f"{header}\n3,4,999999\n5,17,999999\n")
    predict(run, tmp_path / "new.csv", tmp_path / "out.csv", progress=False)
    assert len(caplog.messages) == len(words)
    assert all(word in message for word, message in zip(words, caplog.messages, strict=True))


def test_nothing_is_told_of_times_where_the_data_have_none(
    workspace: Workspace, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rellax.ctr.predict")
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    path.write_text(path.read_text().replace('"timed": true', '"timed": false'))
    (tmp_path / "new.csv").write_text("user_id,item_id\n3,4\n")
    predict(run, tmp_path / "new.csv", tmp_path / "out.csv", data=tmp_path / "data", progress=False)
    assert not caplog.messages


def test_a_time_where_the_data_have_none(workspace: Workspace, run: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    path.write_text(path.read_text().replace('"timed": true', '"timed": false'))
    (tmp_path / "new.csv").write_text("user_id,item_id,time\n3,4,5\n")
    with pytest.raises(InputError, match=r"new.csv, line 2: expected no time, the data in .* have no times"):
        predict(run, tmp_path / "new.csv", tmp_path / "out.csv", data=tmp_path / "data", progress=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user_id,item_id\n3,4\n99,4\n", r"new.csv, line 3: user_id '99' is not in the data"),
        ("user_id,item_id\n3,x 1\n", r"new.csv, line 2: item_id 'x 1' is not in the data"),
        (
            "user_id,film\n3,4\n",
            r"new.csv: expected a column 'item_id', found user_id, film; --columns takes a column map",
        ),
        ("user_id,item_id\n3,\n", r"new.csv, line 2: expected a value of item_id, found none"),
        (
            "user_id,item_id,time\n3,4,soon\n",
            r"new.csv, line 2: expected time as a number, found 'soon'",
        ),
        ("user_id,item_id,time\n3,4,1997-01-02\n", r"line 2: expected time as a number, found '1997-"),
        ("user_id,item_id,user_id\n3,4,5\n", r"new.csv: expected each column once"),
        ("user_id,item_id,time\n3,4,5\n", r"line 2: expected a user with behaviours before that time.*'3'"),
        ("user_id,item_id\n", r"new.csv: expected at least one row, found none"),
        ("user_id,item_id\n3,4,5\n", r"new.csv: expected a readable table"),
        ("user_id,item_id,probability\n3,4,0.5\n", r"new.csv: expected no column 'probability'"),
    ],
    ids=[
        "user",
        "item",
        "column",
        "empty-id",
        "time",
        "date",
        "column-twice",
        "no-history",
        "no-rows",
        "ragged",
        "twice",
    ],
)
def test_bad_tables(run: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        predict(run, tmp_path / "new.csv", tmp_path / "out.csv", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"user_id": [3.5]}, "row 1: expected user_id as text or a whole number, found 3.5"),
        ({"time": [True]}, "row 1: expected time as a number, found True"),
        ({"time": [math.inf]}, "row 1: expected time as a number, found inf"),
        (
            {"history": [[{"item_id": 4}]]},
            r"row 1: history\[0\]: expected a rating of the data, .*found None",
        ),
    ],
    ids=["float-id", "bool-time", "float-time", "history"],
)
def test_bad_parquet(run: Path, tmp_path: Path, column: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table({"user_id": [3], "item_id": [4]} | column), tmp_path / "new.parquet")
    with pytest.raises(InputError, match=words):
        predict(run, tmp_path / "new.parquet", tmp_path / "out.csv", progress=False)


def test_whole_ids_with_a_point(run: Path, tmp_path: Path) -> None:
    """As a data frame has whole numbers beside gaps: in `rellax prepare` these are the same ids."""
    for name, kind in (("whole", pa.int64()), ("point", pa.float64()), ("short", pa.float32())):
        table = pa.table({"user_id": pa.array([3, 5], kind), "item_id": pa.array([4, 17], kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        predict(run, tmp_path / f"{name}.parquet", tmp_path / f"{name}-out.parquet", progress=False)
    one, two, three = (
        read(tmp_path / f"{name}-out.parquet")["probability"].to_pylist()
        for name in ("whole", "point", "short")
    )
    assert one == two == three


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_rows_that_are_wrong_can_be_answered(run: Path, tmp_path: Path, suffix: str) -> None:
    write(pa.table({"user_id": ["3", "99", "5"], "item_id": ["4", "4", "x"]}), tmp_path / f"new{suffix}")
    out = tmp_path / f"out{suffix}"
    assert predict(run, tmp_path / f"new{suffix}", out, errors="answer", progress=False) == 3
    rows = read(out).to_pylist()
    assert 0 < rows[0]["probability"] < 1
    assert not rows[0]["error"]
    assert [row["probability"] for row in rows[1:]] == [None, None]
    assert rows[1]["error"].startswith("user_id '99' is not in the data")
    assert rows[2]["error"].startswith("item_id 'x' is not in the data")


def test_names_of_own_data(run: Path, tmp_path: Path) -> None:
    """A column map's names and delimiter, and a history in a table."""
    interactions = {"file": "x.csv", "delimiter": ";", "user": "who", "item": "what", "rating": "stars"}
    column_map = {"name": "a", "item_noun": "b", "interactions": interactions, "items": {}}
    (tmp_path / "map.json").write_text(json.dumps(column_map))
    (tmp_path / "a.csv").write_text("what;note;who\n4;a;3\n17;b;5\n")
    (tmp_path / "b.csv").write_text("user_id,item_id\n3,4\n5,17\n")
    predict(run, tmp_path / "a.csv", tmp_path / "a.parquet", columns=tmp_path / "map.json", progress=False)
    predict(run, tmp_path / "b.csv", tmp_path / "b.parquet", progress=False)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("a", "b"))
    assert one.column_names == ["what", "note", "who", "probability"]
    assert one["probability"].to_pylist() == two["probability"].to_pylist()
    with pytest.raises(InputError, match=r"expected a column 'who', found user_id,item_id$"):
        predict(run, tmp_path / "b.csv", tmp_path / "c.csv", columns=tmp_path / "map.json", progress=False)
    predict(run, tmp_path / "a.csv", tmp_path / "c.csv", columns=tmp_path / "map.json", progress=False)
    like_what_was_read = pa.csv.ParseOptions(delimiter=";")
    assert pa.csv.read_csv(tmp_path / "c.csv", parse_options=like_what_was_read).equals(
        one.set_column(0, "what", pa.array([4, 17])).set_column(2, "who", pa.array([3, 5]))
    )

    history = [[{"item_id": "2", "rating": 5.0, "time": 3}], None]
    brought = pa.table(
        {"user_id": ["new", "5"], "item_id": ["4", "17"], "history": history, "user": ["a", "b"]}
    )
    write(brought, tmp_path / "c.parquet")
    predict(run, tmp_path / "c.parquet", tmp_path / "out.csv", progress=False)
    found = read(tmp_path / "out.csv")
    assert found.column_names == ["user_id", "item_id", "user", "probability"]
    assert found["probability"][1].as_py() == pytest.approx(two["probability"][1].as_py(), abs=2e-6)


BEHAVIOUR = {"item_id": "2", "rating": 5.0, "time": 3}
STRUCT = pa.struct({"item_id": pa.string(), "rating": pa.float64(), "time": pa.int64()})


@pytest.mark.parametrize(
    "kind",
    [pa.large_list(STRUCT), pa.list_(STRUCT, 1), pa.list_view(STRUCT), pa.large_list_view(STRUCT)],
    ids=["large", "fixed", "view", "large-view"],
)
def test_histories_in_lists_of_any_type(run: Path, tmp_path: Path, kind: pa.DataType) -> None:
    for name, history in (("a", pa.list_(STRUCT)), ("b", kind)):
        column = pa.array([[BEHAVIOUR], [BEHAVIOUR]], history)
        table = pa.table({"user_id": ["new", "5"], "item_id": ["4", "17"], "history": column})
        try:
            pq.write_table(table, tmp_path / f"{name}.parquet")
        except pa.ArrowNotImplementedError:
            pytest.skip(f"this pyarrow writes no {kind}")
        predict(run, tmp_path / f"{name}.parquet", tmp_path / f"{name}.csv", progress=False)
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_history_that_is_no_list(tmp_path: Path, suffix: str) -> None:
    table = pa.table({"user_id": ["3"], "item_id": ["4"], "history": ["2 5 3"]})
    write(table, tmp_path / f"new{suffix}")
    with pytest.raises(InputError, match="expected history as lists of behaviours, in Parquet, found string"):
        predict("no run", tmp_path / f"new{suffix}", tmp_path / "out.parquet", progress=False)


def test_a_history_that_no_row_has(run: Path, tmp_path: Path) -> None:
    table = pa.table({"user_id": ["3"], "item_id": ["4"], "history": [None]})
    pq.write_table(table, tmp_path / "new.parquet")
    assert predict(run, tmp_path / "new.parquet", tmp_path / "out.csv", progress=False) == 1


def test_columns_that_csv_cannot_hold(tmp_path: Path) -> None:
    """Said before the run is read."""
    pq.write_table(pa.table({"user_id": [3], "item_id": [4], "tags": [[1]]}), tmp_path / "new.parquet")
    with pytest.raises(InputError, match=r"CSV can hold, or --out ….parquet, found 'tags' of list<.*int64>$"):
        predict("no run", tmp_path / "new.parquet", tmp_path / "out.csv", progress=False)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_times_with_a_fraction(run: Path, tmp_path: Path, suffix: str) -> None:
    for name, moments in (("whole", ["999998", "999999"]), ("point", ["999998.0", "999999.5"])):
        ids = pa.table({"user_id": ["3", "5"], "item_id": ["4", "17"]})
        numbers = pa.array(list(map(float, moments))) if suffix != ".csv" else pa.array(moments)
        if name == "whole":
            numbers = numbers.cast(pa.int64())
        write(ids.append_column("time", numbers), tmp_path / f"{name}{suffix}")
        predict(run, tmp_path / f"{name}{suffix}", tmp_path / f"out-{name}{suffix}", progress=False)
    one, two = (read(tmp_path / f"out-{name}{suffix}")["probability"] for name in ("whole", "point"))
    assert one.to_pylist() == two.to_pylist()


def test_the_time_of_own_data_has_a_name_of_its_own(workspace: Workspace, run: Path, tmp_path: Path) -> None:
    interactions = {"file": "x.csv", "user": "who", "item": "what", "rating": "stars", "time": "when"}
    column_map = {"name": "a", "item_noun": "b", "interactions": interactions, "items": {}}
    (tmp_path / "map.json").write_text(json.dumps(column_map))
    dataset = Dataset.load(workspace.data)
    table = raw_rows(dataset, dataset.indices("train")[:5])  # much comes after these
    own = table.rename_columns(["what", "who", "when"])
    found = []
    for rows, columns in ((table, None), (own, tmp_path / "map.json"), (table.drop_columns("time"), None)):
        write(rows, tmp_path / "new.csv")
        predict(run, tmp_path / "new.csv", tmp_path / "out.parquet", columns=columns, progress=False)
        found.append(pq.read_table(tmp_path / "out.parquet")["probability"].to_pylist())
    assert found[1] == found[0] != found[2]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_own_columns_that_are_called_user_and_history(run: Path, tmp_path: Path, suffix: str) -> None:
    interactions = {"file": "x.csv", "user": "user", "item": "history", "rating": "stars"}
    column_map = {"name": "a", "item_noun": "b", "interactions": interactions, "items": {}}
    (tmp_path / "map.json").write_text(json.dumps(column_map))
    write(pa.table({"user": ["3", "5"], "history": ["4", "17"]}), tmp_path / f"new{suffix}")
    out = tmp_path / f"out{suffix}"
    predict(run, tmp_path / f"new{suffix}", out, columns=tmp_path / "map.json", progress=False)
    assert read(out).column_names == ["user", "history", "probability"]


class Streams:
    """Standard input and output as a service sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *blocks: bytes) -> None:
        self.out, self.flushed, arriving = io.BytesIO(), [], iter(blocks)
        self.out.flush = lambda: self.flushed.append(self.out.getvalue().count(b"\n"))  # type: ignore[method-assign]
        source = SimpleNamespace(read1=lambda _: next(arriving, b""))
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=source))
        monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=self.out))

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


A, B = b'{"user_id": 3, "item_id": "4", "id": "\xc3\xa9"}\n', b'{"user_id": "5", "item_id": 17}\n'


def test_lines_are_answered_as_they_arrive(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, A + B, A[:9], A[9:] + b"\n\n" + B + B[:5], B[5:-1])
    assert predict(run) == 5
    assert streams.flushed == [2, 4, 5]
    one, two, three, four, five = streams.answers()
    assert one.items() >= {"user_id": 3, "item_id": "4", "id": "é"}.items()
    assert [one["probability"], two["probability"]] * 2 == pytest.approx(
        [row["probability"] for row in (three, four, one, five)], abs=2e-6
    )
    assert abs(one["probability"] - two["probability"]) > 1e-5


def test_half_of_a_surrogate_pair(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, A[:-2] + b', "note": "\\ud83d"}\n' + A)
    assert predict(run) == 2
    first, second = streams.out.getvalue().splitlines()
    assert json.loads(first)["note"] == "\ud83d"
    assert "é".encode() in second


BAD = [
    (b"{user_id: 3}", "expected a JSON object, but Expecting property name"),
    (b"[" * 100_000, "expected a JSON object, but maximum recursion depth exceeded"),
    (b"\xff\xfe{", "expected a JSON object, but "),
    (b"[3, 4]", r"expected a JSON object, found \[3, 4\]"),
    (b'"' + b"x" * 1000 + b'"', "expected a JSON object, found 'x{79}…$"),
    (b'{"user_id": 99, "item_id": 4}', "user_id '99' is not in the data"),
    (b'{"user_id": 3}', "expected a value of item_id, found none"),
]


@pytest.mark.parametrize(
    ("line", "words"), BAD, ids=["json", "deep", "bytes", "list", "long", "user", "missing"]
)
def test_a_line_that_is_wrong(run: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, words: str) -> None:
    streams = Streams(monkeypatch, b"\n" + A + line + b"\n" + B)
    with pytest.raises(InputError, match=f"standard input, line 3: {words}"):
        predict(run)
    assert [answer["item_id"] for answer in streams.answers()] == ["4"]
    assert streams.flushed == [1]

    streams = Streams(monkeypatch, b"\n" + A + line + b"\n" + B)
    assert predict(run, errors="answer") == 3
    first, wrong, last = streams.answers()
    assert re.match(words, wrong["error"])
    assert "probability" not in wrong
    assert 0 < first["probability"] < 1
    assert 0 < last["probability"] < 1


def test_a_service_in_a_process(run: Path) -> None:
    """Answers come while the pipe is open, nothing else is printed, a reader that goes away is no error."""
    command = [sys.executable, "-m", "rellax.ctr.cli", "predict", run.name, "--work", str(run.parent)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for line in (A, B):
            process.stdin.write(line)
            process.stdin.flush()
            assert 0 < json.loads(process.stdout.readline())["probability"] < 1
        process.stdout.close()
        process.stdin.write(A)
        process.stdin.close()
        assert "Error" not in process.stderr.read().decode()
    assert process.returncode == 0


def test_bad_paths(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("user_id,item_id\n3,4\n")
    with pytest.raises(InputError, match="expected a table, found none"):
        predict(run, tmp_path / "none.csv", tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"out.txt: expected a file that ends in .csv or .parquet"):
        predict(run, tmp_path / "new.csv", tmp_path / "out.txt")
    with pytest.raises(InputError, match=r"--out: expected a file that ends in .csv or .parquet, got '-'"):
        predict(run, tmp_path / "new.csv")
    with pytest.raises(InputError, match=r"out.csv: expected a file that ends in .jsonl, or '-'"):
        predict(run, "-", tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"new.txt: .* ends in .csv or .parquet or .jsonl, or '-'"):
        predict(run, tmp_path / "new.txt", tmp_path / "out.csv")
    with pytest.raises(InputError, match="errors: expected one of stop, answer, got 'none'"):
        predict(run, tmp_path / "new.csv", tmp_path / "out.csv", errors="none")
    (tmp_path / "new.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"new.parquet: expected a readable table, but "):
        predict(run, tmp_path / "new.parquet", tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"config.json: expected a JSON file, found none"):
        predict(tmp_path, tmp_path / "new.csv", tmp_path / "out.csv")
