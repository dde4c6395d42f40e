"""The data folder that `rellax prepare` writes, in memory: items, users, histories and samples.

Histories are kept once, as columns of all behaviours, and a sample is a position in one of them: 8 bytes a
behaviour and 14 a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import DTypeLike

from rellax._files import read_json
from rellax.ctr.stream import Table, check_grouped, check_ids, check_places
from rellax.errors import InputError

SPLITS = ("train", "valid", "test")
COLUMNS = {
    "items": ("item", "item_id", "title", "text"),
    "users": ("user", "user_id", "profile"),
    "behaviours": ("user", "item", "rating", "time"),
    "samples": ("user", "item", "position", "label", "split"),
}
_META = ("item_noun", "timed", "rating_scale", "positive_above", "unrated", "answers", "question", "features")

WORDING = ("item_noun", "question", "answers", "positive_above", "rating_scale", "unrated")
"""What of dataset.json decides how prompts read."""
WORDING_FILE = "wording.json"
"""Of a training run: that, as it was."""


@dataclass(frozen=True)
class Samples:
    """One array per field, of length S, in global (time, user, item) order; in random order without times.

    `position` is the number of earlier behaviours of that user, and so the target's row in their history; in
    data prepared `strictly_before`, of those before its time, so that its row is that one or a later one of
    that time. `split` indexes `SPLITS`.
    """

    user: np.ndarray  # int32
    item: np.ndarray  # int32
    position: np.ndarray  # int32
    label: np.ndarray  # int8, 0 or 1
    split: np.ndarray  # int8

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set of N items, U users, M behaviours and S samples.

    Attributes:
        meta: contents of dataset.json (name, counts, label rule, rating scale, feature columns).
        items, users: tables whose row is the dense id; `title`, `text` and `profile` are ready for prompts.
        behaviour_items, behaviour_ratings: (M,), grouped by user and in history order.
        offsets: (U + 1,) int64; user u's history is rows offsets[u] to offsets[u + 1].
    """

    folder: Path
    meta: dict[str, Any]
    items: pa.Table
    users: pa.Table
    behaviour_items: np.ndarray  # int32
    behaviour_ratings: np.ndarray  # float32
    offsets: np.ndarray
    samples: Samples

    @classmethod
    def load(cls, folder: str | Path) -> Dataset:
        """Read a data folder.

        Raises:
            InputError: a file or column is missing, or ids and positions do not fit each other.
        """
        folder = Path(folder)
        meta = read_json(folder / "dataset.json", maker="rellax prepare")
        if not isinstance(meta, dict):
            raise InputError(
                f"{folder / 'dataset.json'}: expected what `rellax prepare` writes, found another"
            )
        lacking = [name for name in _META if name not in meta]
        if lacking:
            raise InputError(
                f"{folder / 'dataset.json'}: expected an entry {lacking[0]!r}, found none; "
                "`rellax prepare` of this version makes it"
            )
        _check_meta(folder / "dataset.json", meta)
        items, users = (_table(folder, name).read() for name in ("items", "users"))
        behaviours, samples = _table(folder, "behaviours"), _table(folder, "samples")
        dataset = cls(
            folder=folder,
            meta=meta,
            items=items,
            users=users,
            behaviour_items=_array(behaviours, "item", np.int32),
            behaviour_ratings=_array(behaviours, "rating", np.float32),
            offsets=_offsets(behaviours, users.num_rows),
            samples=Samples(
                user=_array(samples, "user", np.int32),
                item=_array(samples, "item", np.int32),
                position=_array(samples, "position", np.int32),
                label=_array(samples, "label", np.int8),
                split=_array(samples, "split", np.int8),
            ),
        )
        dataset._check()
        return dataset

    def indices(self, split: str) -> np.ndarray:
        """All samples of a split, rising."""
        if split not in SPLITS:
            raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        return np.flatnonzero(self.samples.split == SPLITS.index(split))

    def choose(
        self, split: str, n: int | None, seed: int, *, name: str = "samples", at_most: bool = False
    ) -> np.ndarray:
        """`n` random samples of a split, rising; None takes all. With the same seed, a larger `n` only adds.

        Args:
            name: what an error calls `n`.
            at_most: take all where the split has fewer.

        Raises:
            InputError: the split has fewer than `n` samples.
        """
        indices = self.indices(split)
        if n is None or (at_most and n > len(indices)):
            return indices
        if not 1 <= n <= len(indices):
            raise InputError(f"{name}: expected 1 to {len(indices)} samples of split {split!r}, got {n}")
        return np.sort(np.random.default_rng(seed).permutation(indices)[:n])

    def history(self, sample: int) -> slice:
        """Rows of the behaviours before `sample`'s target, oldest first."""
        start = int(self.offsets[self.samples.user[sample]])
        return slice(start, start + int(self.samples.position[sample]))

    @cached_property
    def behaviour_times(self) -> np.ndarray:
        """(M,) int64; 0 where the data have no times. Read when it is first asked for."""
        return _array(_table(self.folder, "behaviours"), "time", np.int64)

    @cached_property
    def titles(self) -> list[str]:
        """Title of every item."""
        return self.items["title"].to_pylist()

    @cached_property
    def texts(self) -> list[str]:
        """Title, year and genres of every item."""
        return self.items["text"].to_pylist()

    @cached_property
    def profiles(self) -> list[str]:
        """Who each user is, in a few words."""
        return self.users["profile"].to_pylist()

    def _check(self) -> None:
        path, samples = self.folder / "samples.parquet", self.samples
        check_ids(self.folder / "behaviours.parquet", "item", self.behaviour_items, self.items.num_rows)
        check_ids(path, "user", samples.user, len(self.offsets) - 1)
        later = self.meta.get("strictly_before", False)
        check_places(
            path,
            self.behaviour_items,
            self.offsets,
            samples.user,
            samples.item,
            samples.position,
            later=later,
        )


def _table(folder: Path, name: str) -> Table:
    return Table(folder, name, COLUMNS[name])


def _check_meta(path: Path, meta: dict[str, Any]) -> None:
    """Raise unless the entries that prompts and models are made from are of their kinds."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    scale, answers, features = meta["rating_scale"], meta["answers"], meta["features"]
    right = {
        "item_noun": isinstance(meta["item_noun"], str),
        "timed": isinstance(meta["timed"], bool),
        "rating_scale": isinstance(scale, list) and len(scale) == 2 and all(map(number, scale)),
        "positive_above": number(meta["positive_above"]),
        "unrated": meta["unrated"] is None or number(meta["unrated"]),
        "answers": answers is None or (names(answers) and len(answers) == 2),
        "question": meta["question"] is None or isinstance(meta["question"], str),
        "strictly_before": isinstance(meta.get("strictly_before", False), bool),
        "features": isinstance(features, dict)
        and all(names(features.get(kind)) for kind in ("item", "user")),
    }
    for name, is_right in right.items():
        if not is_right:
            raise InputError(f"{path}: {name}: expected what `rellax prepare` writes, found {meta[name]!r}")


def _array(table: Table, column: str, dtype: DTypeLike) -> np.ndarray:
    """A column as one array: of `split` the indices in `SPLITS`."""
    array = np.empty(table.rows, dtype)
    row = 0
    for block in _blocks(table, column):
        if not np.can_cast(block.dtype, dtype, "same_kind") or row + len(block) > table.rows:
            raise table.damaged(TypeError(f"{column} is {block.dtype}, of {row + len(block)} rows or more"))
        array[row : row + len(block)] = block
        row += len(block)
    if row != table.rows:
        raise table.damaged(ValueError(f"{column} has {row} rows of {table.rows}"))
    return array


def _blocks(table: Table, column: str) -> Iterator[np.ndarray]:
    for batch in table.batches([column]):
        values = batch.column(0)
        if pa.types.is_dictionary(values.type) or pa.types.is_string(values.type):
            values = pc.index_in(values, value_set=pa.array(SPLITS))
        yield table.values(column, values)


def _offsets(behaviours: Table, users: int) -> np.ndarray:
    """Where each user's behaviours begin, and where all end."""
    lengths, last = np.zeros(users, dtype=np.int64), 0
    for block in _blocks(behaviours, "user"):
        if not np.issubdtype(block.dtype, np.integer):
            raise InputError(f"{behaviours.path}: expected whole numbers as user, found {block.dtype}")
        check_ids(behaviours.path, "user", block, users)
        last = check_grouped(behaviours.path, block, last)
        lengths += np.bincount(block, minlength=users)
    return np.append(0, np.cumsum(lengths))
