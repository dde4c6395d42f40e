"""BookCrossing as its publisher handed it out: quoted Latin-1 with semicolons, and rows that are broken."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rellax.ctr.sources.source import Source
from rellax.ctr.sources.tables import TEXT, Format, read_text, strings
from rellax.errors import InputError

_FILES = {
    "BX-Book-Ratings.csv": ("User-ID", "ISBN", "Book-Rating"),
    "BX-Books.csv": (
        *("ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher"),
        *("Image-URL-S", "Image-URL-M", "Image-URL-L"),
    ),
    "BX-Users.csv": ("User-ID", "Location", "Age"),
}
# Values hold semicolons and escaped quotes, so only a semicolon between quotes separates.
# Some rows lack one, or are cut in two by a line end: they have too few fields then.
_SEPARATORS = [(b'";NULL;"', b"\x1fNULL\x1f"), (b'";NULL', b"\x1fNULL"), (b'";"', b"\x1f")]
_RATINGS = "|".join(map(str, range(11)))
_AGES = range(5, 101)
_NOTHING = ("", "n/a", "NULL")


def read_bookcrossing(folder: str | Path) -> Source:
    """`BX-Book-Ratings.csv`, `BX-Books.csv` and `BX-Users.csv`, as in BX-CSV-Dump.zip.

    There are no times. Rating 0 says that a user had the book, not how they liked it. Left out, and counted:
    broken rows, books and users listed twice, ratings of books or users in no table.

    Raises:
        InputError: a file is missing, or its first line is another.
    """
    odd, dropped, rows = {}, {}, {}
    tables = []
    for name, header in _FILES.items():
        table, broken = _read(Path(folder) / name, header)
        rows[name] = table.num_rows + broken
        dropped[f"{name}: rows with missing or extra fields"] = broken
        tables.append(table)
    interactions, dropped["BX-Book-Ratings.csv: ratings that are not 0 to 10"] = _interactions(tables[0])
    items, dropped["BX-Books.csv: books listed before"] = _first_of_each(tables[1], "ISBN")
    people, dropped["BX-Users.csv: users listed before"] = _first_of_each(tables[2], "User-ID")
    books, odd["books without a year"] = _books(items)
    users, odd["users without a plausible age"] = _users(people)
    return Source(
        name="bookcrossing",
        item_noun="book",
        items=books,
        users=users,
        interactions=interactions,
        item_features=("author", "year"),
        user_features=("country", "age_group"),
        rating_scale=(1.0, 10.0),
        positive_above=4.0,
        interactions_files={Path(folder) / "BX-Book-Ratings.csv": interactions.num_rows},
        first_line=2,
        files=tuple(Path(folder) / name for name in _FILES),
        rows=rows,
        odd=odd,
        dropped=dropped,
        unrated=0.0,
        drop_unknown=True,
    )


def _read(path: Path, header: tuple[str, ...]) -> tuple[pa.Table, int]:
    """A file's columns as text without the outermost quotes, and its number of broken rows."""
    if not path.is_file():
        raise InputError(f"{path}: expected this file, found none")
    with path.open(encoding="latin-1") as file:
        first = file.readline().rstrip("\r\n")
    expected = ";".join(f'"{name}"' for name in header)
    if first != expected:
        raise InputError(f"{path}, line 1: expected {expected}, found {first}")
    broken = 0

    def count() -> None:
        nonlocal broken
        broken += 1

    form = Format("\x1f", encoding="latin-1", header=header, replace=_SEPARATORS, skip_lines=1, broken=count)
    table = read_text(path, dict.fromkeys(header, TEXT), form)
    whole = pc.starts_with(table[0], '"')  # a line may also be the end of a row that was cut in two
    broken += table.num_rows - pc.sum(whole).as_py() if table.num_rows else 0
    table = table.filter(whole)
    columns = table.columns
    columns[0] = pc.utf8_slice_codeunits(columns[0], 1)
    columns[-1] = pc.replace_substring_regex(columns[-1], '"$', "")
    return pa.table(columns, names=list(header)), broken


def _interactions(ratings: pa.Table) -> tuple[pa.Table, int]:
    valid = pc.match_substring_regex(ratings["Book-Rating"], f"^({_RATINGS})$")
    kept = ratings.filter(valid)
    columns = {
        "user_id": kept["User-ID"].dictionary_encode(),
        "item_id": kept["ISBN"].dictionary_encode(),
        "rating": pc.cast(kept["Book-Rating"], pa.float32()),
    }
    return pa.table(columns), ratings.num_rows - kept.num_rows


def _first_of_each(table: pa.Table, key: str) -> tuple[pa.Table, int]:
    seen = pc.index_in(table[key], value_set=pc.unique(table[key]))
    numbered = pa.table({"id": seen, "row": pa.array(range(table.num_rows), pa.int64())})
    rows = numbered.group_by("id").aggregate([("row", "min")])["row_min"].sort()
    return table.take(rows), table.num_rows - len(rows)


def _books(table: pa.Table) -> tuple[pa.Table, int]:
    without_year = 0
    rows = []
    for isbn, raw_title, raw_author, raw_year, raw_publisher in zip(
        *(strings(table, name) for name in _FILES["BX-Books.csv"][:5]), strict=True
    ):
        title, author, publisher = map(_clean, (raw_title, raw_author, raw_publisher))
        year = raw_year if re.fullmatch(r"[12]\d{3}", raw_year) else ""
        without_year += not year
        title = title or "Unknown title"
        name = f"{title} by {author}" if author else title
        details = ", ".join(part for part in (publisher, year) if part)
        rows.append(
            {
                "item_id": isbn,
                "title": name,
                "text": f"{name} ({details})" if details else name,
                "author": author or "unknown",
                "year": year or "unknown",
            }
        )
    schema = pa.schema(dict.fromkeys(("item_id", "title", "text", "author", "year"), TEXT))
    return pa.Table.from_pylist(rows, schema), without_year


def _users(table: pa.Table) -> tuple[pa.Table, int]:
    without_age = 0
    rows = []
    for user_id, location, raw_age in zip(
        *(strings(table, name) for name in _FILES["BX-Users.csv"]), strict=True
    ):
        age = int(raw_age) if raw_age.isdecimal() and len(raw_age) < 4 and int(raw_age) in _AGES else None
        without_age += age is None
        places = [_clean(place) for place in location.split(",")]
        known = [place for place in places if place]
        words = [f"from {', '.join(known)}"] if known else []
        words += [f"{age} years old"] if age is not None else []
        rows.append(
            {
                "user_id": user_id,
                "profile": ", ".join(words),
                "country": (places[-1] if len(places) >= 3 else "") or "unknown",
                "age_group": "unknown" if age is None else f"{age // 10 * 10}-{age // 10 * 10 + 9}",
            }
        )
    schema = pa.schema(dict.fromkeys(("user_id", "profile", "country", "age_group"), TEXT))
    return pa.Table.from_pylist(rows, schema), without_age


def _clean(text: str) -> str:
    """A value without escapes and entities, "" where it says nothing."""
    text = html.unescape(re.sub(r"\\(.)", r"\1", text)).strip()
    return "" if text in _NOTHING else text
