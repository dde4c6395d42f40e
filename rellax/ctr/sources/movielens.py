"""MovieLens as its publisher hands it out (1M, 25M), and the 100K that the embedded default brings along."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rellax.ctr.sources.source import Source
from rellax.ctr.sources.tables import ID, RATING, TEXT, TIME, Format, read_text, strings
from rellax.errors import InputError

_AGE_GROUPS = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+"}
_GENDERS = {"M": "man", "F": "woman"}
_OCCUPATIONS = (
    "other",
    "academic or educator",
    "artist",
    "clerical worker",
    "student",
    "customer service",
    "doctor or health care",
    "executive or manager",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales or marketing",
    "scientist",
    "self-employed",
    "technician or engineer",
    "tradesman or craftsman",
    "unemployed",
    "writer",
)
_ARTICLES = "The|A|An|Il|La|Le|Les|L'|Das|Der|Die|Det|El|O"
_MISSING = ("", "unkonwn", "unknown", "(no genres listed)")  # the second spelling is a file's own
_TABS = Format(delimiter="\t")
_CSV = Format(quoted=True)


def read_ml_100k(folder: str | Path) -> Source:
    """MovieLens-100K as tab-separated `ml-100k.inter`, `.item` and `.user` with headers like `user_id:token`.

    Raises:
        InputError: a file or column is missing, or a line cannot be read.
    """
    inter, item, user = (Path(folder) / f"ml-100k.{part}" for part in ("inter", "item", "user"))
    columns = {"user_id:token": ID, "item_id:token": ID, "rating:float": RATING, "timestamp:float": TIME}
    ratings = read_text(inter, columns, _TABS)
    names = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
    films = read_text(item, _named(names), _TABS)
    about = ("user_id:token", "age:token", "gender:token", "occupation:token")
    people = read_text(user, _named(about), _TABS)
    return _source(
        "ml-100k",
        {inter: ratings, item: films, user: people},
        *_films(*(strings(films, name) for name in films.column_names), separator=" "),
        users=_people(user, 2, *(strings(people, name) for name in people.column_names)),
    )


def read_ml_1m(folder: str | Path) -> Source:
    """MovieLens-1M as published: `ratings.dat`, `movies.dat`, `users.dat`, Latin-1, `::` between the fields.

    Raises:
        InputError: a file is missing, or a line cannot be read.
    """
    ratings_file, movies_file, users_file = (
        Path(folder) / f"{part}.dat" for part in ("ratings", "movies", "users")
    )
    columns = {"UserID": ID, "MovieID": ID, "Rating": RATING, "Timestamp": TIME}
    ratings = read_text(ratings_file, columns, _double_colons(*columns))
    names = ("MovieID", "Title", "Genres")
    films = read_text(movies_file, _named(names), _double_colons(*names))
    about = ("UserID", "Gender", "Age", "Occupation")
    people = read_text(users_file, _named(about), _double_colons(*about, "Zip-code"))
    ids, genders, ages, codes = (strings(people, name) for name in people.column_names)
    occupations = []
    for row, code in enumerate(codes):
        if not (code.isdecimal() and len(code) < 3 and int(code) < len(_OCCUPATIONS)):
            limit = len(_OCCUPATIONS) - 1
            raise InputError(
                f"{users_file}, line {row + 1}: expected occupation 0 to {limit}, found {code!r}"
            )
        occupations.append(_OCCUPATIONS[int(code)])
    return _source(
        "ml-1m",
        {ratings_file: ratings, movies_file: films, users_file: people},
        *_films(strings(films, "MovieID"), strings(films, "Title"), None, strings(films, "Genres")),
        users=_people(users_file, 1, ids, ages, genders, occupations, coded=True),
        first_line=1,
    )


def read_ml_25m(folder: str | Path) -> Source:
    """MovieLens-25M as published: `ratings.csv` and `movies.csv`; users have no features.

    Raises:
        InputError: a file or column is missing, or a line cannot be read.
    """
    ratings_file, movies_file = Path(folder) / "ratings.csv", Path(folder) / "movies.csv"
    columns = {"userId": ID, "movieId": ID, "rating": RATING, "timestamp": TIME}
    ratings = read_text(ratings_file, columns, Format())
    films = read_text(movies_file, _named(("movieId", "title", "genres")), _CSV)
    ids = pa.concat_arrays([chunk.dictionary for chunk in ratings["userId"].chunks] or [pa.array([], TEXT)])
    ids = pc.unique(ids)
    return _source(
        "ml-25m",
        {ratings_file: ratings, movies_file: films},
        *_films(strings(films, "movieId"), strings(films, "title"), None, strings(films, "genres")),
        users=pa.table({"user_id": ids, "profile": pa.array([""] * len(ids), TEXT)}),
        rating_scale=(0.5, 5.0),
    )


def _source(
    name: str,
    tables: dict[Path, pa.Table],
    items: pa.Table,
    odd: dict[str, int],
    *,
    users: pa.Table,
    rating_scale: tuple[float, float] = (1.0, 5.0),
    first_line: int = 2,
) -> Source:
    """What all of MovieLens has in common; the first of `tables` has user, item, rating and time."""
    ratings_file = next(iter(tables))
    return Source(
        name=name,
        item_noun="film",
        items=items,
        users=users,
        interactions=tables[ratings_file].rename_columns(["user_id", "item_id", "rating", "time"]),
        item_features=("genres", "year"),
        user_features=tuple(column for column in users.column_names if column not in ("user_id", "profile")),
        rating_scale=rating_scale,
        positive_above=3.0,
        interactions_files={ratings_file: tables[ratings_file].num_rows},
        first_line=first_line,
        files=tuple(tables),
        rows={path.name: table.num_rows for path, table in tables.items()},
        odd=odd,
    )


def _named(columns: tuple[str, ...]) -> dict[str, pa.DataType]:
    """Columns of text after one of ids."""
    return dict.fromkeys(columns, TEXT) | {columns[0]: ID}


def _double_colons(*header: str) -> Format:
    # A title may hold a tab or a comma, but no unit separator.
    return Format(delimiter="\x1f", encoding="latin-1", header=header, replace=[(b"::", b"\x1f")])


def _films(
    ids: list[str], titles: list[str], years: list[str] | None, genres: list[str], *, separator: str = "|"
) -> tuple[pa.Table, dict[str, int]]:
    """The table of items, and what was odd; without `years` they stand at the titles' ends."""
    odd = {"items without a title": 0, "items without a year": 0}
    if years is not None:
        odd["items whose year is only in the title"] = 0
    rows = []
    for item_id, raw_title, raw_year, listed in zip(
        ids, titles, years or [""] * len(ids), genres, strict=True
    ):
        title, year = _title_and_year(raw_title.strip(), raw_year)
        odd["items without a title"] += not title
        odd["items without a year"] += not year
        if years is not None:
            odd["items whose year is only in the title"] += year != raw_year and bool(year)
        title = title or "Unknown title"
        names = [] if listed in _MISSING else listed.split(separator)
        rows.append(
            {
                "item_id": item_id,
                "title": title,
                "text": (f"{title} ({year})" if year else title) + (". " + ", ".join(names) if names else ""),
                "genres": "|".join(names) or "unknown",
                "year": year or "unknown",
            }
        )
    schema = pa.schema(dict.fromkeys(("item_id", "title", "text", "genres", "year"), TEXT))
    return pa.Table.from_pylist(rows, schema), odd


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
    path: Path,
    first_line: int,
    ids: list[str],
    ages: list[str],
    genders: list[str],
    occupations: list[str],
    *,
    coded: bool = False,
) -> pa.Table:
    """The table of users; a `coded` age is the first year of its group, and the prompt shows the group."""
    rows = []
    for row, (user_id, age, gender, occupation) in enumerate(
        zip(ids, ages, genders, occupations, strict=True)
    ):
        line = f"{path}, line {row + first_line}"
        if not age.isdecimal() or len(age) > 3 or (coded and int(age) not in _AGE_GROUPS):
            expected = f"one of the ages {', '.join(map(str, _AGE_GROUPS))}" if coded else "an age in years"
            raise InputError(f"{line}: expected {expected}, found {age!r}")
        if gender not in _GENDERS:
            raise InputError(f"{line}: expected gender M or F, found {gender!r}")
        group = _AGE_GROUPS[max((start for start in _AGE_GROUPS if start <= int(age)), default=1)]
        words = [_GENDERS[gender], group if coded else age]
        words += [occupation] if occupation not in ("other", "none", "") else []
        rows.append(
            {
                "user_id": user_id,
                "profile": ", ".join(words),
                "gender": gender,
                "age_group": group,
                "occupation": occupation,
            }
        )
    schema = pa.schema(dict.fromkeys(("user_id", "profile", "gender", "age_group", "occupation"), TEXT))
    return pa.Table.from_pylist(rows, schema)
