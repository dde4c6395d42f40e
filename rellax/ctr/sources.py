"""Readers of raw rating data: one function per file format, all handing out the same `Source`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rellax.errors import InputError

_AGE_GROUPS = ((18, "under 18"), (25, "18-24"), (35, "25-34"), (45, "35-44"), (50, "45-49"), (56, "50-55"))
_GENDERS = {"M": "man", "F": "woman"}
_ARTICLES = "The|A|An|Il|La|Le|Les|L'|Das|Der|Die|Det|El|O"
_MISSING = ("", "unkonwn", "unknown")  # the first spelling is the file's own


@dataclass(frozen=True)
class Source:
    """Raw rating data in the one shape `prepare` takes.

    Attributes:
        name: of the data set.
        item_noun: what an item is called in a prompt.
        items: strings `item_id`, `title`, `text` (what is embedded: title, year, genres) and item features.
        users: strings `user_id`, `profile` (a phrase for the prompt) and user features.
        interactions: `user_id`, `item_id` strings, `rating` float64, `time` int64, in file order.
        item_features, user_features: categorical columns for the classical model.
        rating_scale: lowest and highest rating.
        positive_above: the label is 1 where the rating is larger than this.
        interactions_file, first_line: where row 0 of `interactions` came from, for error messages.
        files: all files that were read.
        odd: how often something irregular was met and mended, by description.
    """

    name: str
    item_noun: str
    items: pa.Table
    users: pa.Table
    interactions: pa.Table
    item_features: tuple[str, ...]
    user_features: tuple[str, ...]
    rating_scale: tuple[float, float]
    positive_above: float
    interactions_file: Path
    first_line: int
    files: tuple[Path, ...]
    odd: dict[str, int]

    def line(self, row: int) -> str:
        """File and line of an interaction."""
        return f"{self.interactions_file}, line {row + self.first_line}"


def read_ml_100k(folder: str | Path) -> Source:
    """MovieLens-100K as tab-separated `ml-100k.inter`, `.item` and `.user` with headers like `user_id:token`.

    Raises:
        InputError: a file or column is missing, or a line cannot be read.
    """
    inter, item, user = (Path(folder) / f"ml-100k.{part}" for part in ("inter", "item", "user"))
    interactions = _read_tsv(inter, ("user_id:token", "item_id:token", "rating:float", "timestamp:float"))
    films = _read_tsv(
        item, ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
    )
    people = _read_tsv(user, ("user_id:token", "age:token", "gender:token", "occupation:token"))
    items, odd = _films(*(column.to_pylist() for column in films.columns))
    return Source(
        name="ml-100k",
        item_noun="film",
        items=items,
        users=_people(user, *(column.to_pylist() for column in people.columns)),
        interactions=pa.table(
            {
                "user_id": interactions[0],
                "item_id": interactions[1],
                "rating": _numbers(inter, interactions[2]),
                "time": pc.cast(_numbers(inter, interactions[3]), pa.int64(), safe=False),
            }
        ),
        item_features=("genres", "year"),
        user_features=("gender", "age_group", "occupation"),
        rating_scale=(1.0, 5.0),
        positive_above=3.0,
        interactions_file=inter,
        first_line=2,
        files=(inter, item, user),
        odd=odd,
    )


READERS: dict[str, Callable[[str | Path], Source]] = {"ml-100k": read_ml_100k}


def _films(
    ids: list[str], titles: list[str], years: list[str], classes: list[str]
) -> tuple[pa.Table, dict[str, int]]:
    odd = {"items without a title": 0, "items whose year is only in the title": 0, "items without a year": 0}
    rows = []
    for item_id, raw_title, raw_year, genres in zip(ids, titles, years, classes, strict=True):
        title, year = _title_and_year(raw_title, raw_year)
        odd["items without a title"] += not title
        odd["items whose year is only in the title"] += year != raw_year and bool(year)
        odd["items without a year"] += not year
        title = title or "Unknown title"
        names = [] if genres in _MISSING else genres.split(" ")
        rows.append(
            {
                "item_id": item_id,
                "title": title,
                "text": (f"{title} ({year})" if year else title) + (". " + ", ".join(names) if names else ""),
                "genres": "|".join(names) or "unknown",
                "year": year or "unknown",
            }
        )
    return pa.Table.from_pylist(rows), odd


def _title_and_year(title: str, year: str) -> tuple[str, str]:
    """Title in reading order and four-digit year, "" where unknown; a year may hide at the title's end."""
    if match := re.fullmatch(r"(.*) \((\d{4})\)", title):
        title, suffix = match.groups()
        year = year if re.fullmatch(r"\d{4}", year) else suffix
    if title in _MISSING:
        title = ""
    # "Postino, Il" and "Rendezvous in Paris (Rendez-vous de Paris, Les)" carry their articles at the end.
    title = re.sub(rf"(^|\()([^()]+), ({_ARTICLES})(?=$|\)| \()", _article_first, title)
    return title, year if re.fullmatch(r"\d{4}", year) else ""


def _article_first(match: re.Match[str]) -> str:
    opening, name, article = match.groups()
    return f"{opening}{article}{'' if article.endswith(chr(39)) else ' '}{name}"


def _people(
    path: Path, ids: list[str], ages: list[str], genders: list[str], occupations: list[str]
) -> pa.Table:
    rows = []
    for row, (user_id, age, gender, occupation) in enumerate(
        zip(ids, ages, genders, occupations, strict=True)
    ):
        if not age.isdecimal():
            raise InputError(f"{path}, line {row + 2}: expected an age in years, found {age!r}")
        if gender not in _GENDERS:
            raise InputError(f"{path}, line {row + 2}: expected gender M or F, found {gender!r}")
        words = [_GENDERS[gender], age] + ([occupation] if occupation not in ("other", "none", "") else [])
        rows.append(
            {
                "user_id": user_id,
                "profile": ", ".join(words),
                "gender": gender,
                "age_group": next((name for end, name in _AGE_GROUPS if int(age) < end), "56+"),
                "occupation": occupation,
            }
        )
    return pa.Table.from_pylist(rows)


def _read_tsv(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """The named columns of a tab-separated file, in that order, as strings; the first one is an id."""
    if not path.is_file():
        raise InputError(f"{path}: expected this file, found none")
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline().rstrip("\n").split("\t")
    missing = [column for column in columns if column not in header]
    if missing:
        found = ", ".join(map(repr, header))
        raise InputError(f"{path}, line 1: expected a column {missing[0]!r}, found {found}")
    try:
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(use_threads=False),  # with one thread, errors name the line
            parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{path}: expected lines of {len(header)} tab-separated fields in UTF-8 ({error})"
        ) from None
    blank = pc.index(table[0], "").as_py()
    if blank >= 0:
        raise InputError(f"{path}, line {blank + 2}: expected a value of {columns[0]!r}, found none")
    return table


def _numbers(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of strings as float64."""
    numeric = pc.match_substring_regex(column, r"^-?\d+(\.\d+)?$").to_numpy()
    if not numeric.all():
        row = int(np.flatnonzero(~numeric)[0])
        raise InputError(f"{path}, line {row + 2}: expected a number, found {column[row].as_py()!r}")
    return pc.cast(column, pa.float64())
