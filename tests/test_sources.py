"""The publishers' formats, true to their quirks: what is read, mended, left out and counted, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from raw_data import (
    random_interactions,
    write_bookcrossing,
    write_full_ml_25m,
    write_ml_1m,
    write_ml_25m,
    write_ml_100k,
)

from rellax.ctr.config import DATASETS
from rellax.ctr.dataset import Dataset
from rellax.ctr.prepare import prepare, summary
from rellax.ctr.prompts import Wording
from rellax.ctr.sources import READERS, read_bookcrossing, read_ml_1m, read_ml_25m, read_ml_100k
from rellax.errors import InputError

USERS, ITEMS = 12, 31
ROWS = random_interactions(USERS, ITEMS, per_user=14, seed=0)


def test_every_data_set_has_a_reader() -> None:
    assert tuple(READERS) == DATASETS


def test_ml_1m(tmp_path: Path) -> None:
    source = read_ml_1m(write_ml_1m(tmp_path / "raw", ROWS, USERS, ITEMS))
    assert source.rows == {"ratings.dat": len(ROWS), "movies.dat": ITEMS, "users.dat": USERS}
    item, user = source.items.slice(2, 1).to_pylist()[0], source.users.slice(4, 1).to_pylist()[0]
    assert item == {
        "item_id": "3",
        "title": "The Café: Film 3",
        "text": "The Café: Film 3 (1983). Sci-Fi, Drama",
        "genres": "Sci-Fi|Drama",
        "year": "1983",
    }
    assert user == {
        "user_id": "5",
        "profile": "woman, 50-55, customer service",
        "gender": "F",
        "age_group": "50-55",
        "occupation": "customer service",
    }
    prepare(source, tmp_path / "data")
    assert Wording.of(Dataset.load(tmp_path / "data").meta).question == (
        "Did the user rate the film above 3? Yes or No, then the rating from 1 to 5, oldest first:"
    )


def test_the_formats_of_movielens_give_the_same_data(tmp_path: Path) -> None:
    """The same ratings, half a star lower in ml-25m: the same histories and samples, labels apart."""
    prepare(read_ml_100k(write_ml_100k(tmp_path / "raw-a", ROWS, USERS, ITEMS)), tmp_path / "a")
    prepare(read_ml_1m(write_ml_1m(tmp_path / "raw-b", ROWS, USERS, ITEMS)), tmp_path / "b")
    prepare(read_ml_25m(write_ml_25m(tmp_path / "raw-c", ROWS, ITEMS)), tmp_path / "c")
    a, b, c = (Dataset.load(tmp_path / name) for name in "abc")
    for other, shift in ((b, 0.0), (c, 0.5)):
        for name in ("user", "item", "position", "split"):
            assert np.array_equal(getattr(a.samples, name), getattr(other.samples, name))
        assert np.array_equal(a.behaviour_times, other.behaviour_times)
        assert np.array_equal(a.behaviour_ratings, other.behaviour_ratings + np.float32(shift))
    assert np.array_equal(a.samples.label, b.samples.label)
    assert np.array_equal(c.samples.label, a.samples.label)  # 4 - 0.5 is above 3 as well, 3 - 0.5 is not


def test_ml_25m_knows_nothing_of_its_users(tmp_path: Path) -> None:
    source = read_ml_25m(write_ml_25m(tmp_path / "raw", ROWS, ITEMS))
    assert source.user_features == ()
    assert source.users["profile"].to_pylist() == [""] * USERS
    titles = dict(zip(source.items["item_id"].to_pylist(), source.items["text"].to_pylist(), strict=True))
    assert titles["1"] == "The Café, Film 1 (1981). Comedy, War"
    assert titles["9"] == "Film 9 (1999)"  # no genres listed


def test_a_large_ml_25m_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks much smaller than the file, in reading, writing and loading, change nothing."""
    raw = write_full_ml_25m(tmp_path / "raw", users=60, items=200, ratings=3000)
    lines = (raw / "ratings.csv").read_text().splitlines()[1:]
    whole = prepare(read_ml_25m(raw), tmp_path / "whole")
    for name in ("rellax.ctr.prepare._BLOCK", "rellax.ctr.stream._ROWS"):
        monkeypatch.setattr(name, 100)
    monkeypatch.setattr("rellax.ctr.sources.tables._BLOCK_BYTES", 1000)
    assert prepare(read_ml_25m(raw), tmp_path / "data") == whole
    dataset, expected = Dataset.load(tmp_path / "data"), Dataset.load(tmp_path / "whole")
    for name in ("user", "item", "position", "label", "split"):
        assert np.array_equal(getattr(dataset.samples, name), getattr(expected.samples, name))
    assert np.array_equal(dataset.behaviour_items, expected.behaviour_items)
    ids = dataset.items["item_id"].to_pylist()
    found = zip(
        np.repeat(np.arange(60), np.diff(dataset.offsets)) + 1,
        (ids[item] for item in dataset.behaviour_items),
        dataset.behaviour_ratings,
        dataset.behaviour_times,
        strict=True,
    )
    assert sorted(f"{u},{i},{r},{t}" for u, i, r, t in found) == sorted(lines)


BOOKS = [
    f'"{i:010}";"Title {i}; or, a \\"Novel\\"";"Anne &amp; Bob {i}";"{1980 + i}";"House";"s";"m";"l"'
    for i in range(20)
]
PEOPLE = [
    '"1";"paris, n/a, france";NULL',
    '"2";"n/a, n/a, n/a";"244"',
    *(f'"{i}";"town {i}, state, usa";"{20 + i}"' for i in range(3, 40)),
]
RATINGS = [
    f'"{user}";"{item:010}";"{(user * item) % 11}"'
    for user in range(1, 40)
    for item in range(20)
    if (item + user) % 20 < 5 + user % 3
]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A dump with all that is broken in the published one, and more."""
    broken_books = [
        '"078946697X";"Creating the X-Men (Level 4)\\";Michael Teitelbaum";"2000";"DK";"s";"m";"l"',
        BOOKS[0],
        '"9627982032";"The Credit Suisse Guide";NULL;"0";"Edinburgh";"s";"m";"l"',
    ]
    broken_people = ['"275081";"cernusco s', ', milan, italy";NULL', PEOPLE[4]]
    broken_ratings = [
        '"3";"0000000001"',
        '"3";"0000000001";"11"',
        '"3";"no book";"7"',
        '"99";"0000000001";"7"',
    ]
    return write_bookcrossing(
        tmp_path / "raw", RATINGS + broken_ratings, BOOKS + broken_books, PEOPLE + broken_people
    )


def test_bookcrossing_is_read_and_counted(books: Path, tmp_path: Path) -> None:
    source = read_bookcrossing(books)
    items = {row["item_id"]: row for row in source.items.to_pylist()}
    assert len(items) == 21
    assert items["0000000003"] == {
        "item_id": "0000000003",
        "title": 'Title 3; or, a "Novel" by Anne & Bob 3',
        "text": 'Title 3; or, a "Novel" by Anne & Bob 3 (House, 1983)',
        "author": "Anne & Bob 3",
        "year": "1983",
    }
    assert items["9627982032"]["text"] == "The Credit Suisse Guide (Edinburgh)"
    assert source.users.slice(0, 3).to_pylist() == [
        {"user_id": "1", "profile": "from paris, france", "country": "france", "age_group": "unknown"},
        {"user_id": "2", "profile": "", "country": "unknown", "age_group": "unknown"},
        {
            "user_id": "3",
            "profile": "from town 3, state, usa, 23 years old",
            "country": "usa",
            "age_group": "20-29",
        },
    ]
    meta = prepare(source, tmp_path / "data")
    assert meta["rows"] == {
        "BX-Book-Ratings.csv": len(RATINGS) + 4,
        "BX-Books.csv": 23,
        "BX-Users.csv": len(PEOPLE) + 3,
    }
    users = 39
    few = sum(min(5 + user % 3, 5) for user in range(1, 40))
    behaviours = len(RATINGS)
    assert meta["dropped"] == {
        "BX-Book-Ratings.csv: rows with missing or extra fields": 1,
        "BX-Books.csv: rows with missing or extra fields": 1,
        "BX-Users.csv: rows with missing or extra fields": 2,
        "BX-Book-Ratings.csv: ratings that are not 0 to 10": 1,
        "BX-Books.csv: books listed before": 1,
        "BX-Users.csv: users listed before": 1,
        "interactions of users in no table": 1,
        "interactions with items in no table": 1,
        "no sample: fewer than 5 earlier behaviours": few,
        "no sample: not the user's last behaviour": behaviours - few - meta["counts"]["samples"],
    }
    assert meta["odd"] == {"books without a year": 1, "users without a plausible age": 2}
    assert meta["counts"]["users"] == users
    assert "       2  BX-Users.csv: rows with missing or extra fields" in summary(meta)


def test_without_times_each_user_is_one_sample(books: Path, tmp_path: Path) -> None:
    meta = prepare(read_bookcrossing(books), tmp_path / "data")
    prepare(read_bookcrossing(books), tmp_path / "again")
    dataset, again = Dataset.load(tmp_path / "data"), Dataset.load(tmp_path / "again")
    s, lengths = dataset.samples, np.diff(dataset.offsets)
    assert sorted(s.user) == sorted(np.flatnonzero(lengths > 5))
    assert np.array_equal(s.position, lengths[s.user] - 1)
    ratings = dataset.behaviour_ratings[dataset.offsets[s.user] + s.position]
    assert np.array_equal(s.label, ratings >= 5)
    assert 0 < s.label.mean() < 1
    assert [meta["counts"][split]["samples"] for split in ("train", "valid", "test")] == [20, 3, 3]
    assert not np.array_equal(s.user, np.sort(s.user))
    first = dataset.behaviour_items[dataset.offsets[:-1]]
    assert not np.array_equal(first, np.sort(first))
    assert np.array_equal(dataset.behaviour_items, again.behaviour_items)
    assert np.array_equal(s.user, again.samples.user)
    wording = Wording.of(meta)
    assert wording.question == (
        "Did the user rate the book above 4? Yes or No, then the rating from 1 to 10, in no order:"
    )
    assert (wording.answer(0.0), wording.answer(7.0)) == ("No, unrated", "Yes, 7")


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(raw: Path) -> None:
        text = (raw / name).read_text(encoding="latin-1")
        assert old in text
        (raw / name).write_text(text.replace(old, new, 1), encoding="latin-1")

    return edit


BAD_1M = {
    "no file": (lambda raw: (raw / "users.dat").unlink(), "users.dat: expected this file, found none"),
    "one colon": (replaced("ratings.dat", "::", ":"), "ratings.dat, line 1: expected 4 fields, found 3"),
    "age": (
        replaced("users.dat", "3::F::35", "3::F::36"),
        "users.dat, line 3: expected one of the ages 1, 18",
    ),
    "gender": (replaced("users.dat", "3::F::35", "3::?::35"), "line 3: expected gender M or F, found '?'"),
    "occupation": (
        replaced("users.dat", "::35::3::", "::35::21::"),
        "line 3: expected occupation 0 to 20.*'21'",
    ),
    "no id": (replaced("movies.dat", "2::Caf", "::Caf"), "movies.dat, line 2: expected a value of 'MovieID'"),
}


@pytest.mark.parametrize(("edit", "words"), BAD_1M.values(), ids=BAD_1M.keys())
def test_bad_ml_1m(tmp_path: Path, edit: Callable[[Path], None], words: str) -> None:
    raw = write_ml_1m(tmp_path, ROWS, USERS, ITEMS)
    edit(raw)
    with pytest.raises(InputError, match=words):
        read_ml_1m(raw)


BAD_25M = {
    "rating": (replaced("ratings.csv", ".5,", ".x,"), r"ratings.csv, line 2: expected a number as 'rating'"),
    "column": (
        replaced("ratings.csv", "movieId", "film"),
        "line 1: expected a column 'movieId', found 'userId', 'film'",
    ),
    "quote": (replaced("movies.csv", '1)",', "1),"), "movies.csv"),
    "empty": (lambda raw: (raw / "ratings.csv").write_text(""), "ratings.csv: expected fields with ','"),
}


@pytest.mark.parametrize(("edit", "words"), BAD_25M.values(), ids=BAD_25M.keys())
def test_bad_ml_25m(tmp_path: Path, edit: Callable[[Path], None], words: str) -> None:
    raw = write_ml_25m(tmp_path, ROWS, ITEMS)
    edit(raw)
    with pytest.raises(InputError, match=words):
        read_ml_25m(raw)


def test_bad_bookcrossing(books: Path) -> None:
    replaced("BX-Books.csv", '"ISBN";', '"ISBN13";')(books)
    with pytest.raises(InputError, match=r'BX-Books.csv, line 1: expected "ISBN";.*, found "ISBN13";'):
        read_bookcrossing(books)
    (books / "BX-Users.csv").unlink()
    (books / "BX-Books.csv").unlink()
    with pytest.raises(InputError, match=r"BX-Books.csv: expected this file, found none"):
        read_bookcrossing(books)


def test_another_data_set_is_not_overwritten(tmp_path: Path) -> None:
    prepare(read_ml_100k(write_ml_100k(tmp_path / "a", ROWS, USERS, ITEMS)), tmp_path / "data")
    other = read_ml_1m(write_ml_1m(tmp_path / "b", ROWS, USERS, ITEMS))
    with pytest.raises(
        InputError, match=r"data: holds the data set 'ml-100k', expected a new folder for 'ml-1m'"
    ):
        prepare(other, tmp_path / "data")
