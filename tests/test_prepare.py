"""From raw files to the data folder: protocol, mended oddities, and every kind of bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import INTER, ITEM, random_interactions, write_ml_100k

from rellax._files import sha256_file
from rellax.ctr import assets, stream
from rellax.ctr.dataset import Dataset
from rellax.ctr.prepare import prepare, summary
from rellax.ctr.sources import read_ml_100k
from rellax.errors import InputError

USERS, ITEMS = 12, 31  # two-digit ids: "10" < "9" as text
ROWS = random_interactions(USERS, ITEMS, per_user=14, seed=0)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_ml_100k(tmp_path / "raw", ROWS, USERS, ITEMS)


@pytest.fixture
def dataset(raw: Path, tmp_path: Path) -> Dataset:
    prepare(read_ml_100k(raw), tmp_path / "data")
    return Dataset.load(tmp_path / "data")


def test_samples_follow_the_protocol(dataset: Dataset) -> None:
    histories = {user: sorted((t, i, r) for u, i, r, t in ROWS if u == user) for user in range(1, USERS + 1)}
    expected = sorted(
        (time, user, item, position, int(rating > 3))
        for user, history in histories.items()
        for position, (time, item, rating) in enumerate(history)
        if position >= 5
    )
    assert len(expected) == USERS * 9
    s = dataset.samples
    times = dataset.behaviour_times[dataset.offsets[s.user] + s.position]
    found = zip(times, s.user + 1, s.item + 1, s.position, s.label, strict=True)
    assert [tuple(map(int, row)) for row in found] == expected
    train, valid = len(expected) * 8 // 10, len(expected) * 9 // 10
    assert s.split.tolist() == [0] * train + [1] * (valid - train) + [2] * (len(s) - valid)


def test_history_is_what_came_before(dataset: Dataset) -> None:
    for sample in range(0, len(dataset.samples), 7):
        user, item = dataset.samples.user[sample] + 1, dataset.samples.item[sample] + 1
        mine = sorted((t, i, r) for u, i, r, t in ROWS if u == user)
        before = mine[: [i for _, i, _ in mine].index(item)]
        rows = dataset.history(sample)
        found = zip(
            dataset.behaviour_times[rows],
            dataset.behaviour_items[rows] + 1,
            dataset.behaviour_ratings[rows],
            strict=True,
        )
        assert [tuple(map(int, row)) for row in found] == before


def test_tables_are_ready_for_prompts(dataset: Dataset) -> None:
    assert dataset.items["item_id"].to_pylist() == [str(i) for i in range(1, ITEMS + 1)]
    assert dataset.titles[:2] == ["Film 1", "Film 2"]
    assert dataset.texts[0] == "Film 1 (1981). Comedy"
    assert dataset.profiles[:2] == ["woman, 16", "man, 17"]
    assert set(dataset.meta["features"]["item"]) <= set(dataset.items.column_names)
    assert set(dataset.meta["features"]["user"]) <= set(dataset.users.column_names)


def test_counts_and_sources_are_recorded(dataset: Dataset, raw: Path) -> None:
    meta = json.loads((dataset.folder / "dataset.json").read_text())
    counts = meta["counts"]
    assert (counts["items"], counts["users"]) == (ITEMS, USERS)
    assert (counts["behaviours"], counts["samples"]) == (len(ROWS), USERS * 9)
    assert meta["dropped"] == {"no sample: fewer than 5 earlier behaviours": USERS * 5}
    assert meta["rows"] == {"ml-100k.inter": len(ROWS), "ml-100k.item": ITEMS, "ml-100k.user": USERS}
    for split in ("train", "valid", "test"):
        rows = dataset.indices(split)
        positives = int(dataset.samples.label[rows].sum())
        assert counts[split] == {"samples": len(rows), "positives": positives}
    assert meta["source_sha256"]["ml-100k.inter"] == sha256_file(raw / "ml-100k.inter")


def test_users_of_each_split_and_what_is_too_few_are_said(raw: Path, tmp_path: Path) -> None:
    meta = prepare(read_ml_100k(raw), tmp_path / "data")
    dataset, said = Dataset.load(tmp_path / "data"), summary(meta).splitlines()
    for split in ("train", "valid", "test"):
        rows = dataset.indices(split)
        users = len(np.unique(dataset.samples.user[rows]))
        assert meta["split_users"][split] == users
        (line,) = (line for line in said if line.startswith(f"  {split} "))
        assert f"  samples of {users} user" in line
        warnings = [line for line in said if line.startswith(f"  warning  {split}: ")]
        assert len(warnings) == (users < 10)
    assert "split_users" not in json.loads((tmp_path / "data" / "dataset.json").read_text())
    meta["counts"]["train"]["positives"] = 0
    assert "\n  warning  train: one class alone, from which little " in summary(meta)


def test_a_folder_with_other_files_is_left_alone(raw: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"data: expected a new folder, or one of .*found thesis.txt in it"):
        prepare(read_ml_100k(raw), folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").rename(folder / "dataset.json").write_text('["another"]')
    with pytest.raises(InputError, match=r"data: holds the data set None, expected a new folder"):
        prepare(read_ml_100k(raw), folder)
    (folder / "dataset.json").unlink()
    for _ in range(2):
        prepare(read_ml_100k(raw), folder)
    assert len(list(folder.iterdir())) == 5


def test_choose_is_nested_sorted_and_seeded(dataset: Dataset) -> None:
    some, more = dataset.choose("train", 10, seed=1), dataset.choose("train", 40, seed=1)
    assert set(some) < set(more) <= set(dataset.indices("train"))
    assert (np.diff(more) > 0).all()
    assert not np.array_equal(more, dataset.choose("train", 40, seed=2))
    assert np.array_equal(dataset.choose("valid", None, seed=0), dataset.indices("valid"))
    assert np.array_equal(dataset.choose("train", 10, seed=1, at_most=True), some)
    assert np.array_equal(dataset.choose("valid", 99, seed=0, at_most=True), dataset.indices("valid"))
    with pytest.raises(InputError, match=r"1 to 86 samples of split 'train', got 87"):
        dataset.choose("train", 87, seed=0)
    with pytest.raises(InputError, match=r"1 to 86 samples of split 'train', got 0"):
        dataset.choose("train", 0, seed=0)
    with pytest.raises(InputError, match="split: expected one of train, valid, test, got 'dev'"):
        dataset.indices("dev")


def test_a_larger_threshold_of_history(raw: Path, tmp_path: Path) -> None:
    meta = prepare(read_ml_100k(raw), tmp_path / "data", min_history=9, split=(1, 1, 2))
    assert meta["counts"]["samples"] == USERS * 5
    assert [meta["counts"][split]["samples"] for split in ("train", "valid", "test")] == [15, 15, 30]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_history": -1}, "min_history: expected zero or more, got -1"),
        ({"split": (8, 1, 0)}, "split: expected three positive numbers, got 8, 1, 0"),
    ],
    ids=["min_history", "split"],
)
def test_bad_options(raw: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        prepare(read_ml_100k(raw), tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("line", "title", "text"),
    [
        ("1\tUsual Suspects, The\t1995\tCrime Thriller", "The Usual Suspects", "(1995). Crime, Thriller"),
        ("1\tEnfer, L'\t1994\tDrama", "L'Enfer", "L'Enfer (1994). Drama"),
        ("1\tHate (Haine, La)\t1995\tDrama", "Hate (La Haine)", "Hate (La Haine) (1995). Drama"),
        ("1\tPostino, Il (Postman, The)\t1994\tDrama", "Il Postino (The Postman)", "(1994). Drama"),
        ("1\tBye Bye, Love\t1995\tComedy", "Bye Bye, Love", "(1995). Comedy"),
        ("1\tLand (1995)\tV\tAnimation Children's", "Land", "Land (1995). Animation, Children's"),
        ("1\tunkonwn\tunkonwn\tunknown", "Unknown title", "Unknown title"),
        ("1\t\t\t", "Unknown title", "Unknown title"),
        ('1\t"Quoted\t1990\tWar', '"Quoted', '"Quoted (1990). War'),
    ],
    ids=["article", "elided", "original", "both", "comma", "year-in-title", "unknown", "empty", "quote"],
)
def test_odd_items_are_mended(raw: Path, line: str, title: str, text: str) -> None:
    (raw / "ml-100k.item").write_text(f"{ITEM}\n{line}\n", encoding="utf-8")
    items = read_ml_100k(raw).items
    assert items["title"].to_pylist() == [title]
    assert items["text"].to_pylist()[0].endswith(text)


def test_odd_items_are_counted(raw: Path) -> None:
    lines = [ITEM, "1\tunkonwn\tunkonwn\tunknown", "2\tLand (1995)\tV\tWar", "3\tFilm\t1990\tWar"]
    (raw / "ml-100k.item").write_text("\n".join(lines), encoding="utf-8")
    assert read_ml_100k(raw).odd == {
        "items without a title": 1,
        "items whose year is only in the title": 1,
        "items without a year": 1,
    }


def replace_line(part: str, line: int, text: str) -> Callable[[Path], None]:
    def edit(raw: Path) -> None:
        path = raw / f"ml-100k.{part}"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[line - 1] = text
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return edit


BAD = {
    "no file": (lambda raw: (raw / "ml-100k.user").unlink(), "ml-100k.user: expected this file, found none"),
    "no column": (
        replace_line("inter", 1, INTER.replace("rating", "stars")),
        "ml-100k.inter, line 1: expected a column 'rating:float', found 'user_id:token', .*'stars:float'",
    ),
    "header only": (
        lambda raw: (raw / "ml-100k.inter").write_text(INTER + "\n"),
        "ml-100k: split 'train' is empty, there are only 0 samples",
    ),
    "fields missing": (
        replace_line("inter", 4, "1\t2\t3"),
        "ml-100k.inter, line 4: expected 4 fields, found 3",
    ),
    "blank line": (
        replace_line("item", 3, ""),
        "item, line 3: expected a value of 'item_id:token', found none",
    ),
    "unknown item": (replace_line("inter", 9, "1\t99\t3\t5"), "inter, line 9: item '99' is not in the table"),
    "unknown user": (replace_line("inter", 2, "77\t1\t3\t5"), "inter, line 2: user '77' is not in the table"),
    "rating too high": (
        replace_line("inter", 5, "1\t2\t6\t5"),
        "line 5: expected a rating from 1 to 5, found 6",
    ),
    "rating too low": (
        replace_line("inter", 5, "1\t2\t0.5\t5"),
        "line 5: expected a rating from 1 to 5.* 0.5",
    ),
    "rating no number": (
        replace_line("inter", 6, "1\t2\tx\t5"),
        "line 6: expected a number as 'rating:float', found 'x'",
    ),
    "rating not finite": (replace_line("inter", 6, "1\t2\tnan\t5"), "line 6: expected a rating .* nan"),
    "time no number": (replace_line("inter", 7, "1\t2\t3\t"), "line 7: expected a whole number .* found ''"),
    "item twice": (
        replace_line("item", 3, "1\tX\t1990\tWar"),
        "items: expected each item_id once, found '1'",
    ),
    "user twice": (
        replace_line("user", 3, "1\t20\tM\tother\t0"),
        "users: expected each user_id once, found '1'",
    ),
    "age": (
        replace_line("user", 4, "3\told\tM\tother\t0"),
        "user, line 4: expected an age in years, found 'old'",
    ),
    "gender": (
        replace_line("user", 4, "3\t20\tX\tother\t0"),
        "user, line 4: expected gender M or F, found 'X'",
    ),
    "not UTF-8": (
        lambda raw: (raw / "ml-100k.item").write_bytes(f"{ITEM}\n1\t".encode() + b"\xe9\t1990\tWar\n"),
        "ml-100k.item, line 2: expected UTF-8 as 'movie_title:token_seq'",
    ),
}


@pytest.mark.parametrize(("edit", "words"), BAD.values(), ids=BAD.keys())
def test_bad_raw_data(raw: Path, tmp_path: Path, edit: Callable[[Path], None], words: str) -> None:
    edit(raw)
    with pytest.raises(InputError, match=words):
        prepare(read_ml_100k(raw), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_too_few_samples_for_a_split(tmp_path: Path) -> None:
    rows = [(1, item, 4, item) for item in range(1, 11)]
    source = read_ml_100k(write_ml_100k(tmp_path / "raw", rows, 1, 10))
    with pytest.raises(InputError, match=r"split 'valid' is empty, there are only 5 samples"):
        prepare(source, tmp_path / "data")


def test_ids_that_are_no_numbers_sort_as_text(raw: Path, tmp_path: Path) -> None:
    source = read_ml_100k(raw)
    named = pa.array([f"b{i}" for i in source.items["item_id"].to_pylist()])
    rated = pa.array([f"b{i}" for i in source.interactions["item_id"].to_pylist()])
    source = dataclasses.replace(
        source,
        items=source.items.set_column(0, "item_id", named),
        interactions=source.interactions.set_column(1, "item_id", rated),
    )
    prepare(source, tmp_path / "data")
    ids = Dataset.load(tmp_path / "data").items["item_id"].to_pylist()
    assert ids == sorted(ids)
    assert ids.index("b10") < ids.index("b2")


def change(name: str, **columns: list[int]) -> Callable[[Path], None]:
    """Overwrite the first rows of columns of a table."""

    def edit(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        table = pq.read_table(path)
        for column, values in columns.items():
            array = table[column].to_numpy().copy()
            array[: len(values)] = values
            table = table.set_column(table.column_names.index(column), column, pa.array(array))
        pq.write_table(table, path)

    return edit


def drop(name: str, column: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        pq.write_table(pq.read_table(path).drop_columns([column]), path)

    return edit


def as_fractions(name: str, column: str) -> Callable[[Path], None]:
    """Write a column of whole numbers as floating ones, each a little more."""

    def edit(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        table = pq.read_table(path)
        values = pa.array(table[column].to_numpy() + 0.25)
        pq.write_table(table.set_column(table.column_names.index(column), column, values), path)

    return edit


def without_a_value(name: str, column: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"{name}.parquet"
        table = pq.read_table(path)
        values = pa.array([*table[column].to_pylist()[:-1], None], table[column].type)
        pq.write_table(table.set_column(table.column_names.index(column), column, values), path)

    return edit


BAD_FOLDERS = {
    "no dataset.json": (
        lambda f: (f / "dataset.json").unlink(),
        "dataset.json: expected a JSON file, found none",
    ),
    "older version": (
        lambda f: (f / "dataset.json").write_text('{"item_noun": "film"}'),
        "dataset.json: expected an entry 'timed', found none; `rellax prepare`",
    ),
    "no table": (
        lambda f: (f / "users.parquet").unlink(),
        "users.parquet: expected a file of `rellax prepare`",
    ),
    "no Parquet": (lambda f: (f / "items.parquet").write_text("x"), "items.parquet: expected Parquet, but"),
    "no column": (
        drop("samples", "position"),
        "samples.parquet: expected column 'position', found sample, user",
    ),
    "item beyond": (change("behaviours", item=[99]), r"row 0: expected item in 0 to 30, found 99"),
    "item negative": (change("behaviours", item=[3, -1]), r"row 1: expected item in 0 to 30, found -1"),
    "user beyond": (change("samples", user=[12]), r"row 0: expected user in 0 to 11, found 12"),
    "items are fractions": (
        as_fractions("behaviours", "item"),
        r"behaviours.parquet: expected Parquet, but it is damaged \(item is float64",
    ),
    "positions are fractions": (
        as_fractions("samples", "position"),
        r"samples.parquet: expected Parquet, but it is damaged \(position is float64",
    ),
    "an item is missing": (
        without_a_value("behaviours", "item"),
        "behaviours.parquet: expected a value of 'item' in every row, found none",
    ),
    "a label is missing": (
        without_a_value("samples", "label"),
        "samples.parquet: expected a value of 'label' in every row, found none",
    ),
    "users mixed": (change("behaviours", user=[1]), "expected rows grouped by rising user"),
    "position beyond": (change("samples", position=[14]), r"sample 0 \(.*position 14\) is not in behaviours"),
    "another item": (change("samples", item=[0, 0, 0]), r"sample \d \(.*\) is not in behaviours.parquet"),
}


@pytest.mark.parametrize(("edit", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_bad_data_folder(dataset: Dataset, edit: Callable[[Path], None], words: str) -> None:
    edit(dataset.folder)
    with pytest.raises(InputError, match=words):
        Dataset.load(dataset.folder)


def test_a_sample_out_of_its_place_is_found_in_any_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one before or after its user's history, where another user did the same."""
    monkeypatch.setattr(stream, "_ROWS", 4)
    items, offsets, user = np.arange(30), np.array([0, 10, 20, 30]), np.repeat([0, 1, 2], 10)

    def check(item: np.ndarray, position: np.ndarray) -> None:
        stream.check_places(Path("x"), items, offsets, user, item, position, later=False)

    position = np.arange(30) % 10
    check(items, position)
    for sample in range(30):
        here = np.arange(30) == sample
        changes = [(np.where(here, 29 - items, items), position)]
        if user[sample] > 0:
            changes.append((np.where(here, offsets[user] - 1, items), np.where(here, -1, position)))
        if user[sample] < 2:
            changes.append((np.where(here, offsets[user + 1], items), np.where(here, 10, position)))
        for item, places in changes:
            with pytest.raises(
                InputError, match=rf"sample {sample} \(user {user[sample]}, item {item[sample]}, "
            ):
                check(item, places)


def test_an_id_out_of_range_is_found_in_any_block_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_ROWS", 4)
    for row in range(10):
        ids = np.where(np.arange(10) == row, 10, np.arange(10)).astype(np.int32)
        with pytest.raises(InputError, match=f"row {7 + row}: expected item in 0 to 9, found 10"):
            stream.check_ids(Path("x"), "item", ids, 10, 7)
        pq.write_table(pa.table({"item": ids}), tmp_path / "samples.parquet")
        with pytest.raises(InputError, match=f"row {row}: expected item in 0 to 9, found 10"):
            list(stream.stream_ids(tmp_path, "samples", ("item",), {"item": 10}))
        blocks = list(stream.stream_ids(tmp_path, "samples", ("item",), {"item": 11}))
        assert [start for start, _ in blocks] == [0, 4, 8]
        assert np.concatenate([column for _, (column,) in blocks]).tolist() == ids.tolist()


def test_users_that_fall_from_one_block_of_rows_to_the_next(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_ROWS", 14)  # one user's behaviours
    again = Dataset.load(dataset.folder)
    assert np.array_equal(again.offsets, dataset.offsets)
    assert np.array_equal(again.behaviour_items, dataset.behaviour_items)
    change("behaviours", user=[1] * 14 + [0] * 14)(dataset.folder)
    with pytest.raises(InputError, match="expected rows grouped by rising user"):
        Dataset.load(dataset.folder)


def test_movielens_100k(tmp_path: Path) -> None:
    meta = prepare(read_ml_100k(assets.movielens_100k()), tmp_path / "data")
    assert meta["counts"] == {
        "items": 1682,
        "users": 943,
        "behaviours": 100_000,
        "samples": 95_285,
        "train": {"samples": 76_228, "positives": 41_817},
        "valid": {"samples": 9_528, "positives": 5_389},
        "test": {"samples": 9_529, "positives": 5_354},
    }
    dataset = Dataset.load(tmp_path / "data")
    s = dataset.samples
    assert (np.diff(dataset.behaviour_times[dataset.offsets[s.user] + s.position]) >= 0).all()
    # "V" stands for the year of one film, and another is "unkonwn" throughout.
    assert dataset.texts[1411] == (
        "Land Before Time III: The Time of the Great Giving (1995). Animation, Children's"
    )
    assert dataset.texts[266] == "Unknown title"
