"""People's own tables: the documentation's example, literally; the column map's entries; what is refused."""

from __future__ import annotations

import datetime
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from workspace import make_model

from rellax.ctr import cli
from rellax.ctr.buckets import Buckets
from rellax.ctr.dataset import Dataset
from rellax.ctr.prepare import prepare, summary
from rellax.ctr.prompts import PromptBuilder, Wording
from rellax.ctr.requests import Requests
from rellax.ctr.sources import read_own
from rellax.ctr.sources.tables import MOMENT, Format, read_parquet, read_text
from rellax.errors import InputError

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"
BLOCK = re.compile(r'```\w+ title="([^"]+)"\n(.*?)```', re.DOTALL)


def test_the_example_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = dict(BLOCK.findall(text))
    (command,) = re.findall(r"```sh\nrellax (.*)\n```", text)
    (tmp_path / "shop").mkdir()
    for name in ("orders.csv", "products.csv", "customers.csv", "columns.json"):
        (tmp_path / "shop" / name).write_text(blocks[name], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == blocks["output"]
    dataset = Dataset.load("runs/shop/data")
    make_model(tmp_path / "model", dataset)
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(tmp_path / "model"), dataset, k=3, max_tokens=999)
    last = len(dataset.samples) - 1
    position = int(dataset.samples.position[last])
    assert prompts.render(last, range(position - 3, position)) == blocks["prompt"].rstrip("\n")


EVENTS = [
    (f"u{user}", f"i{item}", (user + item) % 2, f"2026-01-{item + 1:02} 0{user}:00:00", f"Item {item}", "red")
    for user in range(3)
    for item in range(10)
]
NAMES = ("who", "what", "bought", "moment", "name", "colour")
MAP: dict[str, Any] = {
    "name": "clicks",
    "item_noun": "article",
    "interactions": {
        "file": "clicks.csv",
        "user": "who",
        "item": "what",
        "label": "bought",
        "time": "moment",
    },
    "items": {"item": "what", "title": "name", "features": ["colour"]},
}

RATED = {"interactions": {"file": "clicks.csv", "user": "who", "item": "what", "rating": "bought"}}


def write(folder: Path, column_map: dict[str, Any], rows: list[tuple[Any, ...]] = EVENTS) -> Path:
    """One table with everything, as CSV and as Parquet, and the map; returns the map's path."""
    table = pa.table(dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True)))
    lines = [",".join(NAMES), *(",".join(map(str, row)) for row in rows)]
    (folder / "clicks.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if all(isinstance(row[3], str) and row[3] for row in rows):
        moments = [datetime.datetime.fromisoformat(row[3]) for row in rows]
        table = table.set_column(3, "moment", pa.array(moments, pa.timestamp("us")))
    pq.write_table(table, folder / "clicks.parquet")
    path = folder / "columns.json"
    path.write_text(json.dumps(column_map), encoding="utf-8")
    return path


def test_one_table_with_labels_and_no_users(tmp_path: Path) -> None:
    meta = prepare(read_own(write(tmp_path, MAP)), tmp_path / "data")
    dataset = Dataset.load(tmp_path / "data")
    assert meta["rows"] == {"clicks.csv": 30}
    assert (meta["counts"]["items"], meta["counts"]["users"], meta["counts"]["samples"]) == (10, 3, 15)
    assert dataset.titles == dataset.texts == [f"Item {item}" for item in range(10)]
    assert dataset.profiles == [""] * 3
    assert meta["features"] == {"item": ["colour"], "user": []}
    assert np.array_equal(dataset.samples.label, (dataset.samples.user + dataset.samples.item) % 2)
    first = datetime.datetime(2026, 1, 1, 0, tzinfo=datetime.timezone.utc)
    assert dataset.behaviour_times[0] == first.timestamp() * 1000
    wording = Wording.of(meta)
    assert wording.question == "Did the user choose the article? Yes or No, oldest first:"
    assert (wording.answer(0.0), wording.answer(1.0)) == ("No", "Yes")


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    prepare(read_own(write(tmp_path, MAP)), tmp_path / "csv")
    events = MAP["interactions"] | {"file": "clicks.parquet"}
    prepare(read_own(write(tmp_path, MAP | {"interactions": events})), tmp_path / "parquet")
    for name in ("items", "users", "behaviours", "samples"):
        assert pq.read_table(tmp_path / "csv" / f"{name}.parquet").equals(
            pq.read_table(tmp_path / "parquet" / f"{name}.parquet")
        )


def test_numbers_as_ids_words_for_labels_and_missing_texts(tmp_path: Path) -> None:
    events = [row for row in EVENTS if row[1] != "i0"] * 2
    path = write(
        tmp_path, MAP | {"answers": ["skipped", "bought"], "question": "Will the customer buy it?"}, events
    )
    table = pq.read_table(tmp_path / "clicks.parquet")
    table = table.set_column(1, "what", pa.array([int(row[1][1:]) for row in events]))
    table = table.set_column(4, "name", pa.array([None if row[1] == "i3" else "N" for row in events]))
    pq.write_table(table, tmp_path / "clicks.parquet")
    column_map = json.loads(path.read_text())
    column_map["interactions"]["file"] = "clicks.parquet"
    del column_map["interactions"]["time"]
    path.write_text(json.dumps(column_map))
    meta = prepare(read_own(path), tmp_path / "data", split=(1, 1, 1))
    dataset = Dataset.load(tmp_path / "data")
    assert dataset.items["item_id"].to_pylist() == [str(item) for item in range(1, 10)]
    assert dataset.titles[2] == "Unknown title"
    assert meta["counts"]["samples"] == 3  # without times one a user
    assert meta["counts"]["behaviours"] == len(events) // 2  # all are there twice
    wording = Wording.of(meta)
    assert wording.question == "Will the customer buy it? Yes or No, in no order:"
    assert (wording.answer(0.0), wording.answer(1.0)) == ("No, skipped", "Yes, bought")


def test_items_without_a_text(tmp_path: Path) -> None:
    lines = [
        "what;name;about",
        "i0;Tea;green",
        "i1;Cup;",
        "i2;;",
        "i3; ;of oak",
        *(f"i{i};N;" for i in range(4, 10)),
    ]
    (tmp_path / "items.csv").write_text("\n".join(lines))
    items = {"file": "items.csv", "delimiter": ";", "item": "what", "title": "name", "text": ["about"]}
    found = read_own(write(tmp_path, MAP | {"items": items})).items
    assert found["title"].to_pylist()[:4] == ["Tea", "Cup", "Unknown title", "Unknown title"]
    assert found["text"].to_pylist()[:4] == ["green", "Cup", "Unknown title", "of oak"]


def test_ratings_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    """In fp32, where 0.6 is more than it is in Python."""
    scores = (0.2, 0.4, 0.6, 0.8, 1.0)
    rows = [(*row[:2], scores[i % 10 * 2 % 5], *row[3:]) for i, row in enumerate(EVENTS)]
    interactions = RATED["interactions"] | {"time": "moment"}
    rule = {"interactions": interactions, "rating_scale": [0.2, 1], "positive_above": 0.6}
    meta = prepare(read_own(write(tmp_path, MAP | rule, rows)), tmp_path / "data")
    dataset = Dataset.load(tmp_path / "data")
    s = dataset.samples
    ratings = dataset.behaviour_ratings[dataset.offsets[s.user] + s.position].tolist()
    said = dict(zip(map(Wording.of(meta).answer, ratings), s.label.tolist(), strict=True))
    assert said == {"No, 0.2": 0, "No, 0.4": 0, "No, 0.6": 0, "Yes, 0.8": 1, "Yes, 1": 1}
    requests, behaviour = Requests(dataset), {"item_id": "i1", "time": "2026-02-01"}
    for score in (0.6, float(np.float32(0.6)), 1):
        history = [behaviour | {"rating": score}]
        assert requests.read({"item_id": "i2", "history": history}).position == 1
    for wrong in (0.61, 1e39, 10**400, float("nan"), True):
        history = [behaviour | {"rating": wrong}]
        with pytest.raises(InputError, match=r"expected a rating of the data, 0\.2, .*, 1, found"):
            requests.read({"item_id": "i2", "history": history})


MOMENTS = {
    "2026-01-03": 0,
    "2026-01-03T10": 36_000_000,
    "2026-01-03T10:00:00Z": 36_000_000,
    "2026-01-03 10:00:00+02:00": 28_800_000,
    "2026-01-03T10:00-0230": 45_000_000,
    "2026-01-03T10:00:00.5+02": 28_800_500,
    "2026-01-03T10:00:00.123456": 36_000_123,
    "2026-01-03T10:00:00.123456789Z": 36_000_123,
}


def test_times_with_zones_and_fractions(tmp_path: Path) -> None:
    path = write(tmp_path, MAP)
    rows = [
        ",".join(map(str, (*row[:3], moment, *row[4:]))) for row, moment in zip(EVENTS, MOMENTS, strict=False)
    ]
    (tmp_path / "clicks.csv").write_text("\n".join([",".join(NAMES), *rows]) + "\n")
    times = read_own(path).interactions["time"].to_numpy()
    midnight = datetime.datetime(2026, 1, 3, tzinfo=datetime.timezone.utc).timestamp() * 1000
    assert (times - midnight).tolist() == list(MOMENTS.values())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_fractions_of_times_are_cut(tmp_path: Path, suffix: str) -> None:
    """Where a column of whole numbers had gaps, pandas writes 3.0."""
    events = MAP["interactions"] | {"file": f"clicks.{suffix}"}
    rows = [(*row[:3], float(1_702_042_297 + i), *row[4:]) for i, row in enumerate(EVENTS)]
    source = read_own(write(tmp_path, MAP | {"interactions": events}, rows))
    assert source.interactions["time"].to_pylist() == [1_702_042_297 + i for i in range(len(EVENTS))]
    assert not source.dates
    rows = [(*row[:3], row[3] + (0.5 if i else 0), *row[4:]) for i, row in enumerate(rows)]
    again = read_own(write(tmp_path, MAP | {"interactions": events}, rows))
    assert again.interactions["time"].equals(source.interactions["time"])


def test_whole_times_may_be_followed_by_fractions(tmp_path: Path) -> None:
    rows = [(*row[:3], f"{100 + i}" + ".25" * (i % 2), *row[4:]) for i, row in enumerate(EVENTS)]
    path = write(tmp_path, MAP)
    (tmp_path / "clicks.csv").write_text("\n".join(",".join(map(str, row)) for row in (NAMES, *rows)))
    assert read_own(path).interactions["time"].to_pylist() == [100 + i for i in range(len(EVENTS))]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_dates_in_parquet_may_be_text(tmp_path: Path, kind: pa.DataType) -> None:
    expected = read_own(write(tmp_path, MAP)).interactions["time"]
    events = MAP["interactions"] | {"file": "clicks.parquet"}
    path = write(tmp_path, MAP | {"interactions": events})
    table = pq.read_table(tmp_path / "clicks.parquet")
    moments = [row[3] for row in EVENTS]
    pq.write_table(table.set_column(3, "moment", pa.array(moments, kind)), tmp_path / "clicks.parquet")
    source = read_own(path)
    assert source.dates
    assert source.interactions["time"].to_pylist() == expected.to_pylist()
    moments[5] = "soon"
    pq.write_table(table.set_column(3, "moment", pa.array(moments, kind)), tmp_path / "clicks.parquet")
    with pytest.raises(
        InputError, match=r"parquet, row 6: expected a date and time as 'moment', found 'soon'"
    ):
        read_own(path)


@pytest.mark.parametrize("words", [("false", "true"), ("False", "True"), ("FALSE", "TRUE")])
def test_labels_may_be_words(tmp_path: Path, words: tuple[str, str]) -> None:
    expected = read_own(write(tmp_path, MAP)).interactions["rating"]
    rows = [(*row[:2], words[row[2]], *row[3:]) for row in EVENTS]
    for suffix in ("csv", "parquet"):
        events = MAP["interactions"] | {"file": f"clicks.{suffix}"}
        source = read_own(write(tmp_path, MAP | {"interactions": events}, rows))
        assert source.interactions["rating"].to_pylist() == expected.to_pylist()


def test_a_first_time_that_is_missing_may_become_either(tmp_path: Path) -> None:
    path = write(tmp_path, MAP)
    lines = [",".join(map(str, row)) for row in (NAMES, (*EVENTS[0][:3], "", *EVENTS[0][4:]), *EVENTS[1:])]
    (tmp_path / "clicks.csv").write_text("\n".join(lines))
    words = r"clicks.csv, row 2: expected a whole number or a date as ISO 8601 in 'moment', found none"
    with pytest.raises(InputError, match=words):
        read_own(path)


def split(folder: Path, suffix: str) -> None:
    """EVENTS as three files in a folder `log`, and one of no rows before them."""
    (folder / "log").mkdir()
    for day in range(4):
        rows = EVENTS[10 * day - 10 : 10 * day] if day else []
        lines = [",".join(NAMES), *(",".join(map(str, row)) for row in rows)]
        if suffix == "csv":
            (folder / "log" / f"{day}.csv").write_text("\n".join(lines) + "\n")
        else:
            table = pa.table(
                dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
            )
            none = pa.table({name: pa.array([], pa.null()) for name in NAMES})
            pq.write_table(table if rows else none, folder / "log" / f"{day}.parquet")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_may_be_of_several_files(tmp_path: Path, suffix: str) -> None:
    one = read_own(write(tmp_path, MAP))
    prepare(one, tmp_path / "one")
    split(tmp_path, suffix)
    names = [f"log/{day}.{suffix}" for day in range(4)]
    said = {f"log/*.{suffix} (4 files)": f"log/*.{suffix}", f"{names[0]}, … (4 files)": [*names, names[0]]}
    for number, (called, file) in enumerate(said.items()):
        path = write(tmp_path, MAP | {"interactions": MAP["interactions"] | {"file": file}})
        source = read_own(path)
        for name in ("interactions", "items", "users"):
            assert getattr(source, name).to_pylist() == getattr(one, name).to_pylist()
        assert source.files == tuple(tmp_path / name for name in names)
        meta = prepare(source, tmp_path / str(number))
        assert meta["rows"] == {called: 30}
        assert meta["source_sha256"].keys() == {Path(name).name for name in names}
        dataset = pq.read_table(tmp_path / "one" / "behaviours.parquet")
        assert pq.read_table(tmp_path / str(number) / "behaviours.parquet").equals(dataset)


def test_files_of_one_name_in_several_folders_keep_their_hashes(tmp_path: Path) -> None:
    split(tmp_path, "csv")
    for day in range(4):
        (tmp_path / "log" / f"day={day}").mkdir()
        (tmp_path / "log" / f"{day}.csv").rename(tmp_path / "log" / f"day={day}" / "part.csv")
    events = MAP["interactions"] | {"file": "log/day=*/part.csv"}
    meta = prepare(read_own(write(tmp_path, MAP | {"interactions": events})), tmp_path / "data")
    assert list(meta["source_sha256"]) == [f"day={day}/part.csv" for day in range(4)]


def test_a_row_of_several_files_is_named_with_its_file(tmp_path: Path) -> None:
    split(tmp_path, "csv")
    path = write(tmp_path, MAP | {"interactions": MAP["interactions"] | {"file": "log/*.csv"}})
    second = tmp_path / "log" / "2.csv"
    text = second.read_text()
    lines = text.splitlines()
    second.write_text(
        "\n".join([*lines[:4], lines[4].replace(",i3,0,", ",i3,7,")]).replace(",i3,1,", ",i3,7,")
    )
    with pytest.raises(InputError, match=r"log/2.csv, line 5: expected a label 0 or 1, found 7"):
        prepare(read_own(path), tmp_path / "data")
    second.write_text(text.replace("2026-01-04", "soon"))
    with pytest.raises(
        InputError, match=r"log/2.csv, row 5: expected a date and time as 'moment', found 'soon"
    ):
        read_own(path)
    numbers = pq.read_table(tmp_path / "clicks.parquet").set_column(3, "moment", pa.array(range(len(EVENTS))))
    pq.write_table(numbers, tmp_path / "log" / "3.parquet")
    path = write(
        tmp_path, MAP | {"interactions": MAP["interactions"] | {"file": ["log/1.csv", "log/3.parquet"]}}
    )
    with pytest.raises(InputError, match=r"3.parquet: expected a date and time as 'moment', found int64"):
        read_own(path)


def test_parquet_is_recognised_by_its_first_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, MAP | {"interactions": MAP["interactions"] | {"file": "clicks.pq"}})
    (tmp_path / "clicks.parquet").rename(tmp_path / "clicks.pq")
    source = read_own(path)
    assert source.interactions.num_rows == len(EVENTS)
    assert source.line(3).endswith("clicks.pq, row 4")


def test_a_feature_of_nearly_as_many_values_as_rows_is_warned_of(tmp_path: Path) -> None:
    def warnings(rows: int, values: int) -> list[str]:
        lines = [f"i{i},N{i},{i % values}.5,red" for i in range(rows)]
        (tmp_path / "items.csv").write_text("\n".join(["what,name,price,colour", *lines]))
        items = {"file": "items.csv", "item": "what", "title": "name", "features": ["price", "colour"]}
        meta = prepare(read_own(write(tmp_path, MAP | {"items": items})), tmp_path / "data")
        assert "scattered" not in json.loads((tmp_path / "data" / "dataset.json").read_text())
        return [line for line in summary(meta).splitlines() if "category" in line]

    assert warnings(120, 61) == [
        "  warning  items: 'price' has 61 values in 120 rows, each a category of its own"
    ]
    assert warnings(120, 60) == warnings(99, 99) == []


def test_of_a_repeated_interaction_the_last_row_counts(tmp_path: Path) -> None:
    again = [(*row[:2], 1 - row[2], *row[3:]) for row in EVENTS[5:20:7]]
    other_time = (*EVENTS[0][:3], "2026-01-31 00:00:00", *EVENTS[0][4:])
    once = [row for row in EVENTS if row not in EVENTS[5:20:7]] + again + [other_time]
    meta = prepare(read_own(write(tmp_path, MAP, [*EVENTS, *again, other_time])), tmp_path / "data")
    prepare(read_own(write(tmp_path, MAP, once)), tmp_path / "once")
    reason = "interactions with the user, item and time of a later row"
    assert meta["dropped"][reason] == len(again) == 3
    assert f"\n  dropped             3  {reason}\n" in summary(meta)
    for name in ("behaviours", "samples"):
        table = pq.read_table(tmp_path / "data" / f"{name}.parquet")
        assert table.equals(pq.read_table(tmp_path / "once" / f"{name}.parquet"))


def test_histories_strictly_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(*row[:3], f"2026-01-0{1 + i % 10 // 4}", *row[4:]) for i, row in enumerate(EVENTS)]
    path = write(tmp_path, MAP, rows)
    arguments = ["prepare", "--columns", str(path), "--work", str(tmp_path), "--strictly-before"]
    assert cli.main(arguments) == 0
    assert "\n  histories end before the first behaviour of the target's time\n" in capsys.readouterr().out
    dataset = Dataset.load(tmp_path / "data")
    assert dataset.meta["strictly_before"] is True
    s = dataset.samples
    # Of ten behaviours at three times (4, 4 and 2) only those of the last time have five before them.
    assert (s.position.tolist(), s.item.tolist()) == ([8] * 6, [8, 9] * 3)
    requests = Requests(dataset)
    for sample in range(len(s)):
        row = {"user_id": f"u{s.user[sample]}", "item_id": f"i{s.item[sample]}", "time": "2026-01-03"}
        assert requests.read(row).position == s.position[sample]
    bucket = Buckets.load(dataset.folder, tmp_path / "sorted").read(0)
    assert bucket.position.tolist() == [8] * 6

    (tmp_path / "data" / "dataset.json").write_text(json.dumps(dataset.meta | {"strictly_before": False}))
    for load in (Dataset.load, lambda folder: Buckets.load(folder, tmp_path / "sorted").read(0)):
        with pytest.raises(InputError, match=r"item 9, position 8\) is not in behaviours.parquet"):
            load(dataset.folder)


def test_a_target_is_never_before_its_position(tmp_path: Path) -> None:
    """It may be after it, where histories end strictly before."""
    prepare(read_own(write(tmp_path, MAP)), tmp_path / "data", strictly_before=True)
    path = tmp_path / "data" / "samples.parquet"
    table = pq.read_table(path)
    first = pa.array([0] * len(table), pa.int32())
    pq.write_table(table.set_column(table.column_names.index("item"), "item", first), path)
    with pytest.raises(InputError, match=r"sample 0 \(user 0, item 0, position 5\) is not in behaviours"):
        Dataset.load(tmp_path / "data")


def test_strictly_before_needs_times(tmp_path: Path) -> None:
    events = {key: value for key, value in MAP["interactions"].items() if key != "time"}
    source = read_own(write(tmp_path, MAP | {"interactions": events}))
    with pytest.raises(InputError, match="strictly_before: expected data with times, clicks has none"):
        prepare(source, tmp_path / "data", strictly_before=True)


def test_unknown_ids(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("what;name\n" + "".join(f"i{i};N{i}\n" for i in range(9)))
    items = {"file": "items.csv", "delimiter": ";", "item": "what", "title": "name"}
    words = (
        r"clicks.csv, line 11: item 'i9' is not in the table of items, which lacks those of 3 of 30 rows; "
        '"unknown_ids": "drop" in a column map leaves such rows out'
    )
    with pytest.raises(InputError, match=words):
        prepare(read_own(write(tmp_path, MAP | {"items": items})), tmp_path / "data")
    path = write(tmp_path, MAP | {"items": items, "unknown_ids": "drop"})
    meta = prepare(read_own(path), tmp_path / "data")
    assert meta["dropped"]["interactions with items in no table"] == 3
    assert meta["rows"] == {"clicks.csv": 30, "items.csv": 9}
    (tmp_path / "users.csv").write_text("who\nu0\nu1\n")
    users = {"file": "users.csv", "user": "who"}
    path = write(tmp_path, MAP | {"items": items, "users": users, "unknown_ids": "drop"})
    meta = prepare(read_own(path), tmp_path / "data")
    reasons = ("interactions of users in no table", "interactions with items in no table")
    assert [meta["dropped"][reason] for reason in reasons] == [10, 2]  # what is both counts once
    assert meta["counts"]["behaviours"] == 18


def test_a_column_map_may_begin_with_a_mark(tmp_path: Path) -> None:
    path = write(tmp_path, MAP)
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert read_own(path).name == "clicks"


def test_the_files_may_be_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    path = write(tmp_path, MAP).rename(tmp_path / "maps" / "columns.json")
    assert read_own(path, tmp_path).name == "clicks"
    with pytest.raises(InputError, match=r"maps/clicks.csv: expected this file, found none"):
        read_own(path)


BAD_MAPS: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": 3}, r"columns.json: name: expected text, found 3"),
    "no file": (
        {"interactions": MAP["interactions"] | {"file": []}},
        r"interactions: file: expected the name of a file, a pattern, or a list of these, found \[\]",
    ),
    "no match": (
        {"interactions": MAP["interactions"] | {"file": "log-*.csv"}},
        r"log-\*.csv: expected files that match this pattern, found none",
    ),
    "surrogate": (
        {"interactions": MAP["interactions"] | {"file": "\ud800/*"}},
        r"file: expected the name of a file, .*, found '.ud800/\*' \(.*surrogates not allowed",
    ),
    "too long": ({"items": MAP["items"] | {"file": "a" * 300}}, r"file: expected the name .* too long"),
    "folder": (
        {"interactions": MAP["interactions"] | {"file": "../"}},
        r"expected a file, or a pattern such as '../\*.csv', found a folder",
    ),
    "typo": ({"itmes": {}}, r"columns.json: expected entries name, .*, found 'itmes'"),
    "no items": ({"items": None}, r"columns.json: items: expected an object, found None"),
    "no title": ({"items": {"item": "what"}}, r"items: expected an entry 'title', found 'item'"),
    "text": ({"items": MAP["items"] | {"text": [1]}}, r"items: text: expected names of columns, found \[1\]"),
    "no text": ({"items": MAP["items"] | {"text": []}}, r"items: text: expected at least one column"),
    "feature": (
        {"items": MAP["items"] | {"features": ["title"]}},
        r"features: expected names other than item, ",
    ),
    "both": (
        {"interactions": MAP["interactions"] | {"rating": "bought"}},
        r"interactions: expected either 'rating' or 'label'",
    ),
    "no scale": (RATED, r"expected an entry 'rating_scale' beside a column of ratings, found none"),
    "scale": (
        RATED | {"rating_scale": [5, 1], "positive_above": 3},
        r"rating_scale: expected the lowest and",
    ),
    "threshold": (
        RATED | {"rating_scale": [1, 5], "positive_above": 5},
        r"positive_above: expected at least 1 and less than 5, found 5",
    ),
    "low threshold": (
        RATED | {"rating_scale": [1, 5], "positive_above": 0.5},
        r"positive_above: expected at least 1 and less than 5, found 0.5",
    ),
    "true": ({"positive_above": True}, r"columns.json: positive_above: expected a number, found True"),
    "one column twice": (
        {"interactions": MAP["interactions"] | {"time": "bought"}},
        r"interactions: expected a column of its own for each entry, found \['who', 'what', 'bought', ",
    ),
    "delimiter": (
        {"items": MAP["items"] | {"delimiter": '"'}},
        r"items: delimiter: expected one ASCII character, found '\"'",
    ),
    "answers": ({"answers": ["no"]}, r"answers: expected what labels 0 and 1 are called, found \['no'\]"),
    "unknown": ({"unknown_ids": "keep"}, r"unknown_ids: expected 'error' or 'drop', found 'keep'"),
    "column": (
        {"interactions": MAP["interactions"] | {"user": "user"}},
        r"clicks.csv, line 1: expected a column 'user', found 'who', 'what', ",
    ),
}


@pytest.mark.parametrize(("changes", "words"), BAD_MAPS.values(), ids=BAD_MAPS.keys())
def test_bad_maps(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path, MAP | changes)
    with pytest.raises(InputError, match=words):
        read_own(path)


def changed(column: int, value: Any) -> list[tuple[Any, ...]]:
    return [*EVENTS[:4], (*EVENTS[4][:column], value, *EVENTS[4][column + 1 :]), *EVENTS[5:]]


def test_all_ratings_but_the_lowest_may_be_a_yes(tmp_path: Path) -> None:
    source = read_own(write(tmp_path, MAP | RATED | {"rating_scale": [0, 1], "positive_above": 0}))
    assert (source.rating_scale, source.positive_above) == ((0.0, 1.0), 0.0)


def test_a_feature_without_a_value_is_unknown(tmp_path: Path) -> None:
    people = {"user": "who", "profile": ["colour", "name"], "features": ["colour"]}
    source = read_own(write(tmp_path, MAP | {"users": people}, changed(5, "")))
    assert source.users["profile"].to_pylist() == ["red, Item 0"] * 3
    assert source.items["colour"].to_pylist() == ["red"] * 4 + ["unknown"] + ["red"] * 5
    assert source.item_features == source.user_features == ("colour",)
    blank = [(*row[:5], "") for row in EVENTS]
    source = read_own(write(tmp_path, MAP | {"users": people}, blank))
    assert source.users["colour"].to_pylist() == ["unknown"] * 3
    assert source.users["profile"].to_pylist() == ["Item 0"] * 3


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (changed(0, ""), r"clicks.csv, line 6: expected a value of 'who', found none"),
        (changed(2, 0.5), r"clicks.csv, line 6: expected a label 0 or 1, found 0.5"),
        (
            changed(2, "yes"),
            r"clicks.csv, row 6: expected a label 0, 1, true or false as 'bought', found 'yes'",
        ),
        (changed(3, "soon"), r"clicks.csv, row 6: expected a date and time as 'moment', found 'soon'"),
        (
            changed(3, "2026-02-30T10:00Z"),
            r"clicks.csv, row 6: expected a date and time .*'2026-02-30T10:00Z'",
        ),
        (changed(4, "a,b"), r"clicks.csv, row 6: expected 6 fields, found 7"),
    ],
    ids=["id", "label", "word", "time", "date", "fields"],
)
def test_bad_rows(tmp_path: Path, rows: list[tuple[Any, ...]], words: str) -> None:
    table = [list(map(str, row)) for row in rows]
    path = write(tmp_path, MAP)
    (tmp_path / "clicks.csv").write_text("\n".join(map(",".join, [list(NAMES), *table])) + "\n")
    with pytest.raises(InputError, match=words):
        prepare(read_own(path), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("encode", "found"),
    [(gzip.compress, "gzip"), (lambda data: data.decode().encode("utf-16"), "UTF-16")],
    ids=["gzip", "utf-16"],
)
def test_what_is_no_plain_text_is_named(tmp_path: Path, encode: Callable[[bytes], bytes], found: str) -> None:
    path = write(tmp_path, MAP)
    file = tmp_path / "clicks.csv"
    file.write_bytes(encode(file.read_bytes()))
    with pytest.raises(InputError, match=rf"clicks.csv: expected plain text in utf8, found {found}$"):
        read_own(path)


def test_of_a_long_value_the_beginning_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path, MAP)
    for rows in (changed(2, "x" * 500), changed(3, "x" * 500)):
        lines = [",".join(map(str, row)) for row in (NAMES, *rows)]
        (tmp_path / "clicks.csv").write_text("\n".join(lines) + "\n")
        with pytest.raises(InputError, match=r"row 6: expected a .*, found 'x{79}…$"):
            read_own(path)


def test_bad_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, MAP | {"interactions": MAP["interactions"] | {"file": "clicks.parquet"}})
    table = pq.read_table(tmp_path / "clicks.parquet")
    missing = pa.array([None, *table["who"].to_pylist()[1:]])
    pq.write_table(table.set_column(0, "who", missing), tmp_path / "clicks.parquet")
    with pytest.raises(InputError, match=r"clicks.parquet, row 1: expected a value as 'who', found none"):
        read_own(path)
    pq.write_table(table.drop_columns(["who"]), tmp_path / "clicks.parquet")
    with pytest.raises(InputError, match=r"clicks.parquet: expected a column 'who', found 'what'"):
        read_own(path)
    twice = pa.array([3, *table["bought"].to_pylist()[1:]])
    pq.write_table(table.set_column(2, "bought", twice), tmp_path / "clicks.parquet")
    with pytest.raises(InputError, match=r"clicks.parquet, row 1: expected a label 0 or 1, found 3"):
        prepare(read_own(path), tmp_path / "data")
    pq.write_table(table.set_column(2, "bought", table["name"]), tmp_path / "clicks.parquet")
    with pytest.raises(
        InputError, match=r"clicks.parquet, row 1: expected a label .* as 'bought', found 'Item 0'"
    ):
        read_own(path)
    (tmp_path / "clicks.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match=r"clicks.parquet: expected Parquet, but it is damaged"):
        read_own(path)


def test_finer_fractions_are_cut_alike_in_both_formats(tmp_path: Path) -> None:
    """Before 1970, where cutting digits and rounding down differ, as after it."""
    microseconds = [-876_500, -1, 1_500]
    moments = pa.array(microseconds).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"time": moments}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"time": moments.cast(pa.timestamp("ns", "UTC"))}), tmp_path / "b.parquet")
    text = "time\n1969-12-31T23:59:59.123500\n1969-12-31 23:59:59.999999Z\n1970-01-01T00:00:00.001500\n"
    (tmp_path / "c.csv").write_text(text, encoding="utf-8")
    tables = [read_parquet(tmp_path / f"{name}.parquet", {"time": MOMENT}) for name in "ab"]
    tables.append(read_text(tmp_path / "c.csv", {"time": MOMENT}, Format(delimiter=",", quoted=True)))
    assert [table["time"].to_pylist() for table in tables] == [[-877, -1, 1]] * 3
