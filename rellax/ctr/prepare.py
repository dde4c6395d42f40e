"""Raw rating data to the data folder: dense ids, histories, labelled samples, and a split.

What is held at once is a few arrays over the behaviours; the samples are written in blocks.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rellax._files import atomic_folder, read_json, sha256_file, write_json
from rellax.ctr.dataset import SPLITS
from rellax.ctr.sources import Source
from rellax.errors import InputError

_BLOCK = 1 << 20
_FILES = ("dataset.json", "items.parquet", "users.parquet", "behaviours.parquet", "samples.parquet")
_MANY = 100  # rows, of which a category should have some
_FEW = 10  # users, of which a bootstrap would draw nearly the same again and again
_SEED = 0  # of the orders that take the place of time where there is none


@dataclass(frozen=True)
class _Behaviours:
    """One array per column of all M behaviours, users together and each user's in history order."""

    user: np.ndarray  # int32
    item: np.ndarray  # int32
    rating: np.ndarray  # float32
    time: np.ndarray  # int64
    position: np.ndarray  # int32: how many of the same user a prompt may show

    def __len__(self) -> int:
        return len(self.user)


def summary(meta: dict[str, Any]) -> str:
    """What `prepare` read, left out and wrote, from what it returned: a line each."""
    counts = meta["counts"]
    lines = [f"{counts['samples']:,} samples of {counts['users']:,} users and {counts['items']:,} items"]
    if meta.get("strictly_before"):
        lines.append("  histories end before the first behaviour of the target's time")
    lines += [f"  read     {rows:>12,}  {name}" for name, rows in meta["rows"].items()]
    lines += [f"  dropped  {rows:>12,}  {reason}" for reason, rows in meta["dropped"].items() if rows]
    lines += [f"  mended   {rows:>12,}  {what}" for what, rows in meta["odd"].items() if rows]
    lines += [f"  warning  {feature}" for feature in meta["scattered"]]
    for name in SPLITS:
        samples, positives = counts[name]["samples"], counts[name]["positives"]
        users = meta["split_users"][name]
        of_users = f"{users:,} user" if users == 1 else f"{users:,} users"
        lines.append(f"  {name:8} {samples:>12,}  samples of {of_users}, {positives / samples:.1%} positive")
        little = ["one class alone"] if positives in (0, samples) else []
        little += [f"fewer than {_FEW} users"] if users < _FEW else []
        if little:
            lines.append(
                f"  warning  {name}: {' and '.join(little)}, from which little can be learnt or told"
            )
    return "\n".join(lines)


def prepare(
    source: Source,
    folder: str | Path,
    *,
    min_history: int = 5,
    split: tuple[int, int, int] = (8, 1, 1),
    strictly_before: bool = False,
) -> dict[str, Any]:
    """Write `source` as a data folder for `Dataset.load`, and return the contents of its dataset.json.

    Beside these stand `split_users`, of how many users each split has samples, and `scattered`, the features
    nearly every row of which is a category of its own.

    A behaviour with at least `min_history` earlier ones of its user is a sample, labelled 1 where the rating
    is larger than `source.positive_above`. Samples stand in global (time, user, item) order, where ids
    compare as numbers if all of them are numbers, and are cut in the proportions `split`. Of interactions of
    the same user, item and time the last one in the file counts.

    Of behaviours of one user and time, those of lower item ids are earlier ones of the others. With
    `strictly_before` they are not: a sample's history ends before the first behaviour of its time.

    Without times, each user's behaviours take a random order of a fixed seed, the last one is the user's only
    sample, and `split` cuts the users, in random order.

    Raises:
        InputError: an id twice in a table, an interaction with an id in no table, a rating off the scale, a
            split without samples, `strictly_before` without times, or `folder` holds another data set, or
            files that are not of one.
    """
    _check_folder(Path(folder), source.name)
    if min_history < 0:
        raise InputError(f"min_history: expected zero or more, got {min_history}")
    if min(split) < 1:
        raise InputError(f"split: expected three positive numbers, got {', '.join(map(str, split))}")
    items, users = _dense(source.items, "item"), _dense(source.users, "user")
    timed = "time" in source.interactions.column_names
    if strictly_before and not timed:
        raise InputError(f"strictly_before: expected data with times, {source.name} has none")
    behaviours, left_out = _behaviours(source, users, items, timed, strictly_before)
    rows = _sample_rows(behaviours, min_history, timed)
    ends = _split_ends(source, len(rows), min_history, split)
    label = behaviours.rating[rows] > source.positive_above
    bounds = {name: slice(start, end) for name, start, end in zip(SPLITS, [0, *ends], ends, strict=False)}
    parts = {name: label[part] for name, part in bounds.items()}
    meta = {
        "name": source.name,
        "item_noun": source.item_noun,
        "source_sha256": _hashes(source.files),
        "rows": source.rows,
        "counts": {
            "items": items.num_rows,
            "users": users.num_rows,
            "behaviours": len(behaviours),
            "samples": len(rows),
            **{name: {"samples": len(part), "positives": int(part.sum())} for name, part in parts.items()},
        },
        "dropped": source.dropped | left_out | _not_sampled(behaviours, len(rows), min_history, timed),
        "odd": source.odd,
        "min_history": min_history,
        "timed": timed,
        "dates": source.dates,
        "positive_above": source.positive_above,
        "rating_scale": list(source.rating_scale),
        "unrated": source.unrated,
        "answers": source.answers,
        "question": source.question,
        "features": {"item": list(source.item_features), "user": list(source.user_features)},
    }
    if strictly_before:
        meta["strictly_before"] = True
    with atomic_folder(folder, own=_FILES) as part:
        pq.write_table(items, part / "items.parquet")
        pq.write_table(users, part / "users.parquet")
        _write(
            part / "behaviours.parquet", len(behaviours), lambda block: _behaviour_block(behaviours, block)
        )
        _write(
            part / "samples.parquet",
            len(rows),
            lambda block: _sample_block(behaviours, rows, label, ends, block),
        )
        write_json(part / "dataset.json", meta)
    return meta | {
        "split_users": {name: _users_of(behaviours, rows[part]) for name, part in bounds.items()},
        "scattered": [
            *_scattered("items", items, source.item_features),
            *_scattered("users", users, source.user_features),
        ],
    }


def _hashes(files: tuple[Path, ...]) -> dict[str, str]:
    """By the names of the files, from the folder on that they share."""
    base = os.path.commonpath([file.absolute().parent for file in files])
    return {os.path.relpath(file, base): sha256_file(file) for file in files}


def _scattered(name: str, table: pa.Table, features: tuple[str, ...]) -> list[str]:
    """Of a table's features those that look like numbers or names, in words."""
    counts = {feature: pc.count_distinct(table[feature]).as_py() for feature in features}
    return [
        f"{name}: {feature!r} has {count:,} values in {table.num_rows:,} rows, each a category of its own"
        for feature, count in counts.items()
        if table.num_rows >= _MANY and 2 * count > table.num_rows
    ]


def _check_folder(folder: Path, name: str) -> None:
    """What is there may be replaced by the same data set anew."""
    path = folder / "dataset.json"
    if not path.exists():
        return
    meta = read_json(path)
    found = meta.get("name") if isinstance(meta, dict) else None
    if found != name:
        raise InputError(f"{folder}: holds the data set {found!r}, expected a new folder for {name!r}")


def _dense(table: pa.Table, kind: str) -> pa.Table:
    """`table` sorted by raw id, numbers as numbers, with the row as its dense id in front."""
    ids = table[f"{kind}_id"].to_pylist()
    numeric = all(raw.isdecimal() and len(raw) < 40 for raw in ids)
    order = sorted(range(len(ids)), key=lambda row: (int(ids[row]) if numeric else 0, ids[row]))
    for row, following in itertools.pairwise(order):
        if ids[row] == ids[following]:
            raise InputError(f"{kind}s: expected each {kind}_id once, found {ids[row]!r} twice")
    return table.take(pa.array(order, pa.int64())).add_column(
        0, kind, pa.array(np.arange(len(ids), dtype=np.int32))
    )


def _behaviours(
    source: Source, users: pa.Table, items: pa.Table, timed: bool, strictly_before: bool
) -> tuple[_Behaviours, dict[str, int]]:
    """All interactions with known ids, each once, and how many others there are, by reason."""
    user, item, dropped = _lookup(source, "user", users), _lookup(source, "item", items), {}
    columns = {"user": user, "item": item, "rating": _ratings(source)}
    columns["time"] = source.interactions["time"].to_numpy() if timed else np.zeros(len(user), np.int64)
    if source.drop_unknown:
        known = (user >= 0) & (item >= 0)
        dropped["interactions of users in no table"] = int((user < 0).sum())
        dropped["interactions with items in no table"] = int(((user >= 0) & (item < 0)).sum())
        columns = {name: values[known] for name, values in columns.items()}
    del user, item
    order = np.lexsort((columns["item"], columns["time"], columns["user"]))
    again = _same_as_next(columns[name][order] for name in ("time", "user", "item"))
    if again.any():
        dropped["interactions with the user, item and time of a later row"] = int(again.sum())
        order = order[~again]
    if not timed:
        order.sort()  # a seed's order is one of the rows as they are in the file
        shuffled = np.random.default_rng(_SEED).permutation(len(order))
        order = order[np.lexsort((shuffled, columns["user"][order]))]
    for name in columns:  # one after another: a column that is in order takes the place of the one before
        columns[name] = columns[name][order]
    del order
    lengths = np.bincount(columns["user"], minlength=users.num_rows)
    position = np.arange(len(columns["user"]), dtype=np.int32)
    if strictly_before:  # of the first one of that time
        position[1:][_same_as_next((columns["time"], columns["user"]))[:-1]] = 0
        np.maximum.accumulate(position, out=position)
    position -= np.repeat((np.cumsum(lengths) - lengths).astype(np.int32), lengths)
    return _Behaviours(**columns, position=position), dropped


def _same_as_next(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Which rows have the values of the row after them, in all columns."""
    same = functools.reduce(np.logical_and, (values[1:] == values[:-1] for values in columns))
    return np.append(same, False)


def _lookup(source: Source, kind: str, table: pa.Table) -> np.ndarray:
    """Dense ids (int32) of the interactions' raw ids; -1 for unknown ones where the source drops them."""
    known = table[f"{kind}_id"].combine_chunks()
    column = source.interactions[f"{kind}_id"]
    dense = np.empty(len(column), dtype=np.int32)
    row = 0
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        codes = pc.fill_null(pc.index_in(encoded.dictionary, value_set=known), -1).to_numpy(False)
        dense[row : row + len(chunk)] = codes[encoded.indices.to_numpy()]
        row += len(chunk)
    if not source.drop_unknown and (dense < 0).any():
        row = int(np.flatnonzero(dense < 0)[0])
        raise InputError(
            f"{source.line(row)}: {kind} {column[row].as_py()!r} is not in the table of {kind}s, which lacks "
            f"those of {int((dense < 0).sum()):,} of {len(dense):,} rows; "
            '"unknown_ids": "drop" in a column map leaves such rows out'
        )
    return dense


def _ratings(source: Source) -> np.ndarray:
    rating = source.interactions["rating"].to_numpy().astype(np.float32, copy=False)
    low, high = source.rating_scale
    wrong = ~((rating >= low) & (rating <= high))
    if source.answers is not None:
        wrong |= rating % 1 != 0
    if source.unrated is not None:
        wrong &= rating != source.unrated
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        expected = "a label 0 or 1" if source.answers is not None else f"a rating from {low:g} to {high:g}"
        raise InputError(f"{source.line(row)}: expected {expected}, found {rating[row]:g}")
    return rating


def _sample_rows(behaviours: _Behaviours, min_history: int, timed: bool) -> np.ndarray:
    """Rows of the behaviours that are samples, in the samples' order."""
    enough = behaviours.position >= min_history
    if timed:
        rows = np.flatnonzero(enough).astype(np.int32)
        # In (user, time, item) order as they stand: a stable sort by time makes that (time, user, item).
        return rows[np.argsort(behaviours.time[rows], kind="stable")]
    is_last = np.append(np.diff(behaviours.user) != 0, True)[: len(behaviours)]
    return np.random.default_rng(_SEED).permutation(np.flatnonzero(enough & is_last))


def _not_sampled(behaviours: _Behaviours, samples: int, min_history: int, timed: bool) -> dict[str, int]:
    """Behaviours that are in histories alone."""
    few = int((behaviours.position < min_history).sum())
    reasons = {f"no sample: fewer than {min_history} earlier behaviours": few}
    if not timed:
        reasons["no sample: not the user's last behaviour"] = len(behaviours) - few - samples
    return reasons


def _split_ends(source: Source, samples: int, min_history: int, split: tuple[int, int, int]) -> np.ndarray:
    """Where each split ends among the samples."""
    ends: np.ndarray = np.cumsum(split) * samples // sum(split)
    sizes = np.diff(ends, prepend=0)
    if not sizes.all():
        raise InputError(
            f"{source.name}: split {SPLITS[int(np.argmin(sizes))]!r} is empty, there are only {samples} "
            f"samples with at least {min_history} earlier behaviours of the same user"
        )
    return ends


def _users_of(behaviours: _Behaviours, rows: np.ndarray) -> int:
    """How many users some behaviours have."""
    seen = np.zeros(int(behaviours.user.max()) + 1, dtype=bool)
    seen[behaviours.user[rows]] = True
    return int(seen.sum())


def _behaviour_block(behaviours: _Behaviours, block: slice) -> pa.Table:
    names = ("user", "item", "rating", "time")
    return pa.table({name: getattr(behaviours, name)[block] for name in names})


def _sample_block(
    behaviours: _Behaviours, rows: np.ndarray, label: np.ndarray, ends: np.ndarray, block: slice
) -> pa.Table:
    chosen, number = rows[block], np.arange(block.start, block.stop, dtype=np.int32)
    split = np.searchsorted(ends, number, side="right").astype(np.int8)
    return pa.table(
        {
            "sample": number,
            "user": behaviours.user[chosen],
            "item": behaviours.item[chosen],
            "position": behaviours.position[chosen],
            "label": label[block].astype(np.int8),
            "time": behaviours.time[chosen],
            "split": pa.DictionaryArray.from_arrays(split, list(SPLITS)),
        }
    )


def _write(path: Path, rows: int, block_at: Callable[[slice], pa.Table]) -> None:
    """A Parquet file of as many rows, a row group for each block."""
    blocks = _blocks(rows)
    first = block_at(next(blocks))
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(block_at(block))


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK))
