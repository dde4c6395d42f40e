"""Raw rating data to the data folder: dense ids, histories, labelled samples, and a split by global time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rellax._files import atomic_folder, sha256_file, write_json
from rellax.ctr.dataset import SPLITS
from rellax.ctr.sources import Source
from rellax.errors import InputError


def prepare(
    source: Source, folder: str | Path, *, min_history: int = 5, split: tuple[int, int, int] = (8, 1, 1)
) -> dict[str, Any]:
    """Write `source` as a data folder for `Dataset.load`, and return the contents of its dataset.json.

    Every behaviour with at least `min_history` earlier ones of its user is a sample, labelled 1 where the
    rating is larger than `source.positive_above`. Samples stand in global (time, user, item) order, where ids
    compare as numbers if all of them are numbers; they are cut in the proportions `split`.

    Raises:
        InputError: an id twice in a table, an interaction with an id in no table, a rating off the scale, or
            a split without samples.
    """
    items, users = _dense(source.items, "item"), _dense(source.users, "user")
    behaviours = _behaviours(source, users, items)
    samples = _samples(source, behaviours, min_history, split)
    label, part_of = samples["label"], samples["split"]
    counts: dict[str, Any] = {
        "items": items.num_rows,
        "users": users.num_rows,
        "behaviours": len(behaviours["user"]),
        "samples": len(label),
    }
    meta = {
        "name": source.name,
        "item_noun": source.item_noun,
        "source_sha256": {path.name: sha256_file(path) for path in source.files},
        "counts": counts | {name: _split_counts(label[part_of == name]) for name in SPLITS},
        "dropped": {
            f"behaviours with fewer than {min_history} earlier ones": counts["behaviours"] - counts["samples"]
        },
        "odd": source.odd,
        "min_history": min_history,
        "positive_above": source.positive_above,
        "rating_scale": list(source.rating_scale),
        "features": {"item": list(source.item_features), "user": list(source.user_features)},
    }
    with atomic_folder(folder) as part:
        pq.write_table(items, part / "items.parquet")
        pq.write_table(users, part / "users.parquet")
        pq.write_table(pa.table(behaviours), part / "behaviours.parquet")
        pq.write_table(pa.table(samples), part / "samples.parquet")
        write_json(part / "dataset.json", meta)
    return meta


def _behaviours(source: Source, users: pa.Table, items: pa.Table) -> dict[str, np.ndarray]:
    """Columns of all interactions with dense ids, in (user, time, item) order."""
    columns = {
        "user": _lookup(source, "user", users),
        "item": _lookup(source, "item", items),
        "rating": _ratings(source),
        "time": source.interactions["time"].to_numpy(),
    }
    order = np.lexsort((columns["item"], columns["time"], columns["user"]))
    return {name: values[order] for name, values in columns.items()}


def _samples(
    source: Source, behaviours: dict[str, np.ndarray], min_history: int, split: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Columns of the behaviours with enough history, in (time, user, item) order."""
    user, item, time = behaviours["user"], behaviours["item"], behaviours["time"]
    position = np.arange(len(user)) - np.searchsorted(user, user)
    rows = np.flatnonzero(position >= min_history)
    rows = rows[np.lexsort((item[rows], user[rows], time[rows]))]
    return {
        "sample": np.arange(len(rows), dtype=np.int32),
        "user": user[rows],
        "item": item[rows],
        "position": position[rows].astype(np.int32),
        "label": (behaviours["rating"][rows] > source.positive_above).astype(np.int8),
        "time": time[rows],
        "split": _split(source, len(rows), min_history, split),
    }


def _dense(table: pa.Table, kind: str) -> pa.Table:
    """`table` sorted by raw id, numbers as numbers, with the row as its dense id in front."""
    ids = table[f"{kind}_id"].to_pylist()
    numeric = all(raw.isdecimal() for raw in ids)
    order = sorted(range(len(ids)), key=lambda row: (int(ids[row]) if numeric else 0, ids[row]))
    for row, following in itertools.pairwise(order):
        if ids[row] == ids[following]:
            raise InputError(f"{kind}s: expected each {kind}_id once, found {ids[row]!r} twice")
    return table.take(order).add_column(0, kind, pa.array(np.arange(len(ids), dtype=np.int32)))


def _lookup(source: Source, kind: str, table: pa.Table) -> np.ndarray:
    """Dense ids (int32) of the interactions' raw ids."""
    raw = source.interactions[f"{kind}_id"]
    dense = pc.fill_null(pc.index_in(raw, value_set=table[f"{kind}_id"].combine_chunks()), -1).to_numpy()
    if (dense < 0).any():
        row = int(np.flatnonzero(dense < 0)[0])
        raise InputError(f"{source.line(row)}: {kind} {raw[row].as_py()!r} is not in the table of {kind}s")
    return dense.astype(np.int32)


def _ratings(source: Source) -> np.ndarray:
    rating = source.interactions["rating"].to_numpy()
    low, high = source.rating_scale
    outside = ~((rating >= low) & (rating <= high))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise InputError(
            f"{source.line(row)}: expected a rating from {low:g} to {high:g}, found {rating[row]:g}"
        )
    return rating.astype(np.float32)


def _split(source: Source, samples: int, min_history: int, split: tuple[int, int, int]) -> np.ndarray:
    ends = np.cumsum(split) * samples // sum(split)
    sizes = np.diff(ends, prepend=0)
    if not sizes.all():
        raise InputError(
            f"{source.name}: split {SPLITS[int(np.argmin(sizes))]!r} is empty, there are only {samples} "
            f"behaviours with at least {min_history} earlier ones of the same user"
        )
    return np.repeat(np.array(SPLITS), sizes)


def _split_counts(label: np.ndarray) -> dict[str, int]:
    return {"samples": len(label), "positives": int(label.sum())}
