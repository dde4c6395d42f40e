"""Raw data in the formats of their publishers, made for a test: small, or as large as MovieLens-25M."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
USER = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
GENRES = ("Drama", "Comedy", "War", "Sci-Fi")
ML_25M = {"users": 162_541, "items": 62_423, "ratings": 25_000_095}

Interaction = tuple[int, int, int, int]  # user, item, rating, time


def write_ml_100k(folder: Path, interactions: Iterable[Interaction], users: int, items: int) -> Path:
    """Files with users 1 to `users`, items 1 to `items` and the given interactions; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    films = [f"{i}\tFilm {i}\t{1980 + i % 20}\t{GENRES[i % 4]}" for i in range(1, items + 1)]
    people = [f"{i}\t{15 + i % 50}\t{'MF'[i % 2]}\tother\t0000{i}" for i in range(1, users + 1)]
    rows = ["\t".join(map(str, row)) for row in interactions]
    for part, lines in (("inter", [INTER, *rows]), ("item", [ITEM, *films]), ("user", [USER, *people])):
        (folder / f"ml-100k.{part}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_ml_1m(folder: Path, interactions: Iterable[Interaction], users: int, items: int) -> Path:
    """`ratings.dat`, `movies.dat` and `users.dat`: no header, `::` between the fields, Latin-1."""
    folder.mkdir(parents=True, exist_ok=True)
    films = [
        f"{i}::Café: Film {i}, The ({1980 + i % 20})::{GENRES[i % 4]}|{GENRES[(i + 1) % 4]}"
        for i in range(1, items + 1)
    ]
    ages = (1, 18, 25, 35, 45, 50, 56)
    people = [f"{i}::{'MF'[i % 2]}::{ages[i % 7]}::{i % 21}::4{i:04}" for i in range(1, users + 1)]
    ratings = ["::".join(map(str, row)) for row in interactions]
    for name, lines in (("ratings", ratings), ("movies", films), ("users", people)):
        (folder / f"{name}.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder


def write_ml_25m(folder: Path, interactions: Iterable[Interaction], items: int) -> Path:
    """`ratings.csv` and `movies.csv`; a rating of r stands as r - 0.5, as there are halves."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{user},{item},{rating - 0.5},{time}" for user, item, rating, time in interactions]
    _write_lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows])
    _write_lines(folder / "movies.csv", ["movieId,title,genres", *_movies(range(1, items + 1))])
    return folder


def write_bookcrossing(
    folder: Path, ratings: Sequence[str], books: Sequence[str], users: Sequence[str]
) -> Path:
    """The three files of BX-CSV-Dump.zip with these lines after their headers, in Latin-1."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = {
        "BX-Book-Ratings.csv": '"User-ID";"ISBN";"Book-Rating"',
        "BX-Books.csv": '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";'
        '"Image-URL-S";"Image-URL-M";"Image-URL-L"',
        "BX-Users.csv": '"User-ID";"Location";"Age"',
    }
    for (name, header), lines in zip(headers.items(), (ratings, books, users), strict=True):
        (folder / name).write_bytes("\r\n".join([header, *lines, ""]).encode("latin-1"))
    return folder


def write_full_ml_25m(folder: Path, *, users: int, items: int, ratings: int, seed: int = 0) -> Path:
    """MovieLens-25M in its format and about its sizes: skewed users and films, a user's ratings in one day.

    As in the original, rows are in (user, film) order, film ids have gaps, and each user has 20 ratings or
    more. The number of ratings falls a fifth of a percent short: users with most of them get a few less.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(np.arange(1, 209_172), size=items, replace=False))
    _write_lines(folder / "movies.csv", ["movieId,title,genres", *_movies(ids.tolist())])
    lengths = 20 + rng.lognormal(3.9, 1.3, users)
    lengths = np.maximum(lengths * (ratings / lengths.sum()), 20).astype(np.int64)
    lengths[np.argmax(lengths)] += ratings - lengths.sum()
    popularity = np.cumsum(1 / np.arange(1, items + 1) ** 0.7)
    scores = pa.array([f"{half / 2}" for half in range(1, 11)])
    schema = pa.schema(
        dict.fromkeys(("userId", "movieId"), pa.int64()) | {"rating": scores.type, "timestamp": pa.int64()}
    )
    options = pa.csv.WriteOptions(include_header=False, quoting_style="none")
    with (
        (folder / "ratings.csv").open("wb") as file,
        pa.csv.CSVWriter(file, schema, write_options=options) as out,
    ):
        file.write(",".join(schema.names).encode() + b"\n")
        for user, films in _distinct_films(rng, lengths, popularity):
            stamps = rng.integers(789_652_009, 1_574_327_703, users + 1)[user] + rng.integers(
                86_400, size=len(user)
            )
            columns = [user, ids[films], scores.take(rng.integers(10, size=len(user))), stamps]
            out.write_table(pa.table(columns, schema=schema))
    return folder


def _distinct_films(
    rng: np.random.Generator, lengths: np.ndarray, popularity: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Users (from 1) and films (from 0) with as many ratings as `lengths` says, or a few less."""
    for start in range(0, len(lengths), 4096):
        wanted = lengths[start : start + 4096]
        user = np.repeat(np.arange(len(wanted)), wanted * 3 + 50)
        films = np.searchsorted(popularity, rng.random(len(user)) * popularity[-1])
        keys = np.unique(user * len(popularity) + np.minimum(films, len(popularity) - 1))
        keys = keys[np.lexsort((rng.random(len(keys)), keys // len(popularity)))]
        user = keys // len(popularity)
        rank = np.arange(len(user)) - np.searchsorted(user, user)
        keys = np.sort(keys[rank < wanted[user]])
        yield keys // len(popularity) + start + 1, keys % len(popularity)


def _movies(ids: Iterable[int]) -> Iterator[str]:
    for i in ids:
        genres = f"{GENRES[i % 4]}|{GENRES[(i + 1) % 4]}" if i % 9 else "(no genres listed)"
        yield (
            f'{i},"Café, Film {i}, The ({1980 + i % 20})",{genres}'
            if i % 3
            else f"{i},Film {i} (1999),{genres}"
        )


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def random_interactions(users: int, items: int, per_user: int, seed: int) -> list[Interaction]:
    """Each user rates `per_user` distinct items, with many equal times, in no order.

    Users like one genre each: its films get 4 or 5, others 1 to 3.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(1, users + 1):
        liked = int(rng.integers(4))
        for item in rng.choice(np.arange(1, items + 1), size=per_user, replace=False):
            rating = rng.integers(4, 6) if item % 4 == liked else rng.integers(1, 4)
            rows.append((user, int(item), int(rating), 1000 + int(rng.integers(40 * per_user))))
    rng.shuffle(rows)
    return [tuple(int(value) for value in row) for row in rows]
