"""People's own interactions, items and users: CSV or Parquet, and a column map in JSON.

    {
      "name": "shop",
      "item_noun": "product",
      "interactions": {"file": "orders.csv", "user": "customer", "item": "sku", "rating": "stars",
                       "time": "day"},
      "rating_scale": [1, 5],
      "positive_above": 3,
      "items": {"file": "products.parquet", "item": "sku", "title": "name", "text": ["name", "brand"],
                "features": ["brand"]},
      "users": {"file": "customers.csv", "user": "id", "profile": ["gender", "city"], "features": ["gender"]}
    }

docs/own-data.md explains each entry.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rellax._files import read_json
from rellax.ctr.sources.source import Source
from rellax.ctr.sources.tables import (
    FLOAT_TIME,
    ID,
    LABEL,
    MOMENT,
    RATING,
    TEXT,
    Format,
    is_parquet,
    read_parquet,
    read_text,
    time_type,
)
from rellax.errors import InputError, one_line

_FILES = str | list
# For each part of the map its entries: the type, and whether it must be there.
_TOP: dict[str, tuple[type | UnionType, bool]] = {
    "name": (str, True),
    "item_noun": (str, True),
    "interactions": (dict, True),
    "items": (dict, True),
    "users": (dict, False),
    "rating_scale": (list, False),
    "positive_above": (float, False),
    "question": (str, False),
    "answers": (list, False),
    "unknown_ids": (str, False),
}
_INTERACTIONS: dict[str, tuple[type | UnionType, bool]] = {
    "file": (_FILES, True),
    "delimiter": (str, False),
    "user": (str, True),
    "item": (str, True),
    "rating": (str, False),
    "label": (str, False),
    "time": (str, False),
}
_ITEMS: dict[str, tuple[type | UnionType, bool]] = {
    "file": (_FILES, False),
    "delimiter": (str, False),
    "item": (str, True),
    "title": (str, True),
    "text": (list, False),
    "features": (list, False),
}
_USERS: dict[str, tuple[type | UnionType, bool]] = {
    "file": (_FILES, False),
    "delimiter": (str, False),
    "user": (str, True),
    "profile": (list, False),
    "features": (list, False),
}
_OURS = ("item", "item_id", "title", "text", "user", "user_id", "profile")
_KINDS = {
    str: "text",
    dict: "an object",
    list: "a list",
    float: "a number",
    _FILES: "the name of a file, a pattern, or a list of these",
}


def read_own(column_map: str | Path, folder: str | Path | None = None) -> Source:
    """Read the tables that a column map names.

    Args:
        column_map: a JSON file.
        folder: where the map's files are; None is the map's own folder.

    Raises:
        InputError: the map has an entry too few, too many or of the wrong kind, a table lacks a column of it,
            or a row cannot be read; the entry, or file and row, is named.
    """
    path = Path(column_map)
    folder = path.parent if folder is None else Path(folder)
    entries = _checked(path, "", read_json(path), _TOP)
    events = _checked(path, "interactions", entries["interactions"], _INTERACTIONS)
    things = _checked(path, "items", entries["items"], _ITEMS)
    people = _checked(path, "users", entries.get("users", {"user": events["user"]}), _USERS)
    labelled = _is_labelled(path, events)
    event_files = _files(folder, events["file"])
    item_files, user_files = (
        _files(folder, part["file"]) if _has_own_table(part, events) else event_files
        for part in (things, people)
    )
    dates = "time" in events and _has_dates(event_files, events)
    interactions, parts = _interactions(event_files, events, labelled, dates)
    items, item_rows = _items(item_files, things, events)
    users, user_rows = _users(user_files, people, events)
    scale, positive_above = (0.0, 1.0), 0.0
    if not labelled:
        scale, positive_above = _rating_rule(path, entries)
    counts = {_called(events["file"], event_files): interactions.num_rows} | item_rows | user_rows
    return Source(
        name=entries["name"],
        item_noun=entries["item_noun"],
        items=items,
        users=users,
        interactions=interactions,
        item_features=tuple(things.get("features", [])),
        user_features=tuple(people.get("features", [])),
        rating_scale=scale,
        positive_above=positive_above,
        interactions_files=parts,
        first_line=2,
        files=tuple(dict.fromkeys([*event_files, *item_files, *user_files])),
        rows=counts,
        answers=_answers(path, entries) if labelled else None,
        question=entries.get("question"),
        drop_unknown=_drops_unknown(path, entries),
        dates=dates,
    )


def event_columns(column_map: str | Path) -> tuple[dict[str, str], str]:
    """What a column map calls `user_id`, `item_id` and maybe `time`, and the delimiter of its interactions.

    Raises:
        InputError: as :func:`read_own`, but no table is looked at.
    """
    path = Path(column_map)
    entries = _checked(path, "", read_json(path), _TOP)
    events = _checked(path, "interactions", entries["interactions"], _INTERACTIONS)
    names = {"user_id": events["user"], "item_id": events["item"]}
    return names | ({"time": events["time"]} if "time" in events else {}), events.get("delimiter", ",")


def _is_labelled(path: Path, events: Mapping[str, Any]) -> bool:
    if ("rating" in events) == ("label" in events):
        raise InputError(f"{path}: interactions: expected either 'rating' or 'label'")
    return "label" in events


def _rating_rule(path: Path, entries: Mapping[str, Any]) -> tuple[tuple[float, float], float]:
    for name in ("rating_scale", "positive_above"):
        if name not in entries:
            raise InputError(f"{path}: expected an entry {name!r} beside a column of ratings, found none")
    scale = entries["rating_scale"]
    numbers = len(scale) == 2 and all(_is_a(end, float) and abs(end) < 1e30 for end in scale)
    if not numbers or not scale[0] < scale[1]:
        raise InputError(f"{path}: rating_scale: expected the lowest and the highest rating, found {scale}")
    threshold = entries["positive_above"]
    if not scale[0] <= threshold < scale[1]:
        raise InputError(
            f"{path}: positive_above: expected at least {scale[0]} and less than {scale[1]}, "
            f"found {threshold}"
        )
    return (float(scale[0]), float(scale[1])), float(threshold)


def _answers(path: Path, entries: Mapping[str, Any]) -> tuple[str, str]:
    words = entries.get("answers", ["no", "yes"])
    if len(words) != 2 or not all(isinstance(word, str) and word for word in words):
        raise InputError(f"{path}: answers: expected what labels 0 and 1 are called, found {words}")
    return words[0], words[1]


def _drops_unknown(path: Path, entries: Mapping[str, Any]) -> bool:
    choice = entries.get("unknown_ids", "error")
    if choice not in ("error", "drop"):
        raise InputError(f"{path}: unknown_ids: expected 'error' or 'drop', found {choice!r}")
    return bool(choice == "drop")


def _interactions(
    files: list[Path], events: Mapping[str, Any], labelled: bool, dates: bool
) -> tuple[pa.Table, dict[Path, int]]:
    """All interactions, and how many rows each file has."""
    wanted = [("user_id", events["user"], ID), ("item_id", events["item"], ID)]
    wanted.append(("rating", events["label"], LABEL) if labelled else ("rating", events["rating"], RATING))
    if "time" in events:
        wanted.append(("time", events["time"], MOMENT if dates else FLOAT_TIME))
    names = [column for _, column, _ in wanted]
    if len(set(names)) < len(names):
        raise InputError(f"interactions: expected a column of its own for each entry, found {names}")
    tables = _read(files, events, {column: kind for _, column, kind in wanted})
    table = pa.concat_tables(tables)
    counts = {file: part.num_rows for file, part in zip(files, tables, strict=True)}
    return pa.table({name: table[column] for name, column, _ in wanted}), counts


def _has_dates(files: list[Path], events: Mapping[str, Any]) -> bool:
    """Whether times are dates, by the first one that there is."""
    kinds = (time_type(file, events["time"], events.get("delimiter", ",")) for file in files)
    return next(filter(None, kinds), FLOAT_TIME) == MOMENT


def _items(
    files: list[Path], part: Mapping[str, Any], events: Mapping[str, Any]
) -> tuple[pa.Table, dict[str, int]]:
    texts, features = part.get("text", [part["title"]]), part.get("features", [])
    if not texts:
        raise InputError("items: text: expected at least one column, found none")
    table, rows = _distinct(files, part, events, "item", [part["title"], *texts, *features])
    titles = _filled(table[part["title"]], "Unknown title")
    text = _filled(_joined(table, texts, ". "), titles)
    columns = {"item_id": table[part["item"]], "title": titles, "text": text}
    return pa.table(columns | _features(table, features)), rows


def _users(
    files: list[Path], part: Mapping[str, Any], events: Mapping[str, Any]
) -> tuple[pa.Table, dict[str, int]]:
    profile, features = part.get("profile", []), part.get("features", [])
    table, rows = _distinct(files, part, events, "user", [*profile, *features])
    columns = {"user_id": table[part["user"]], "profile": _joined(table, profile, ", ")}
    return pa.table(columns | _features(table, features)), rows


def _has_own_table(part: Mapping[str, Any], events: Mapping[str, Any]) -> bool:
    """Whether items or users lie elsewhere than in the table of the interactions."""
    return bool(part.get("file", events["file"]) != events["file"])


def _distinct(
    files: list[Path], part: Mapping[str, Any], events: Mapping[str, Any], kind: str, columns: list[str]
) -> tuple[pa.Table, dict[str, int]]:
    """The table of items or users: a file of its own, or the first row of each id in the interactions."""
    ids = part[kind]
    wanted = dict.fromkeys([ids, *columns], TEXT) | {ids: ID}
    if _has_own_table(part, events):
        table = pa.concat_tables(_read(files, part, wanted))
        return _decoded(table), {_called(part["file"], files): table.num_rows}
    tables = _read(files, {**events, **part}, wanted)
    table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    codes = table[ids].combine_chunks().indices.to_numpy()
    return _decoded(table.take(np.sort(np.unique(codes, return_index=True)[1]))), {}


def _decoded(table: pa.Table) -> pa.Table:
    columns = [column.cast(TEXT) for column in table.columns]
    return pa.table(columns, names=table.column_names)


def _joined(table: pa.Table, columns: list[str], separator: str) -> pa.Array:
    """The values of some columns in one text, without those that are blank."""
    lists = [table[name].to_pylist() for name in columns]
    return pa.array(
        [separator.join(filter(str.strip, row)) for row in zip(*lists, strict=True)]
        if lists
        else [""] * table.num_rows,
        TEXT,
    )


def _features(table: pa.Table, names: list[str]) -> dict[str, pa.Array]:
    return {name: pc.if_else(pc.equal(table[name], ""), "unknown", table[name]) for name in names}


def _filled(texts: Any, instead: Any) -> Any:
    """The texts, with others in the place of those that are blank."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), instead, texts)


def _files(folder: Path, names: str | list[str]) -> list[Path]:
    """The files that an entry names, each once: those of a list in its order, those of a pattern sorted."""
    files: dict[Path, None] = {}
    for name in [names] if isinstance(names, str) else names:
        path = folder / name
        try:
            is_folder, is_pattern = path.is_dir(), glob.has_magic(name) and not path.exists()
            matches = sorted(glob.glob(name, root_dir=folder)) if is_pattern else []
        except (OSError, UnicodeError) as error:  # too long, or half of a surrogate pair
            raise InputError(f"file: expected {_KINDS[_FILES]}, found {name!r} ({one_line(error)})") from None
        if is_folder:
            raise InputError(
                f"{path}: expected a file, or a pattern such as {str(Path(name, '*.csv'))!r}, found a folder"
            )
        if is_pattern:
            if not (found := [folder / match for match in matches if (folder / match).is_file()]):
                raise InputError(f"{path}: expected files that match this pattern, found none")
            files |= dict.fromkeys(found)
        else:
            files[path] = None
    return list(files)


def _called(names: str | list[str], files: list[Path]) -> str:
    """A table's files in few words."""
    first = names if isinstance(names, str) else names[0]
    if len(files) == 1:
        return first
    return f"{first}{'' if isinstance(names, str) else ', …'} ({len(files)} files)"


def _read(files: list[Path], part: Mapping[str, Any], columns: Mapping[str, pa.DataType]) -> list[pa.Table]:
    form = Format(delimiter=part.get("delimiter", ","), quoted=True)
    return [
        read_parquet(file, columns) if is_parquet(file) else read_text(file, columns, form) for file in files
    ]


def _checked(
    path: Path, name: str, found: Any, entries: Mapping[str, tuple[type | UnionType, bool]]
) -> Mapping[str, Any]:
    """A part of the map, all of whose entries are known and of their types."""
    place = f"{path}: {name}: " if name else f"{path}: "
    if not isinstance(found, dict):
        raise InputError(f"{place}expected an object, found {found!r}")
    for entry, value in found.items():
        if entry not in entries:
            raise InputError(f"{place}expected entries {', '.join(entries)}, found {entry!r}")
        kind = entries[entry][0]
        if not _is_a(value, kind):
            raise InputError(f"{place}{entry}: expected {_KINDS[kind]}, found {value!r}")
        if entry == "delimiter" and (len(value) != 1 or not value.isascii() or value in '\n\r\0"'):
            raise InputError(f"{place}delimiter: expected one ASCII character, found {value!r}")
        if entry == "file" and not _are_names([value] if isinstance(value, str) else value):
            raise InputError(f"{place}file: expected {_KINDS[kind]}, found {value!r}")
        named = value if entry in ("text", "profile", "features") else []
        if not all(isinstance(column, str) for column in named):
            raise InputError(f"{place}{entry}: expected names of columns, found {value!r}")
        if entry == "features" and not set(named).isdisjoint(_OURS):
            raise InputError(f"{place}features: expected names other than {', '.join(_OURS)}, found {named}")
    for entry, (_, required) in entries.items():
        if required and entry not in found:
            raise InputError(f"{place}expected an entry {entry!r}, found {', '.join(map(repr, found))}")
    return found


def _are_names(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and "\0" not in value for value in values)


def _is_a(value: Any, kind: type | UnionType) -> bool:
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
