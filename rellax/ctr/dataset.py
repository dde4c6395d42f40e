"""The data folder that `rellax prepare` writes, in memory: items, users, histories and samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax._files import read_json
from rellax.errors import InputError

SPLITS = ("train", "valid", "test")
COLUMNS = {
    "items": ("item", "item_id", "title", "text"),
    "users": ("user", "user_id", "profile"),
    "behaviours": ("user", "item", "rating", "time"),
    "samples": ("sample", "user", "item", "position", "label", "time", "split"),
}


@dataclass(frozen=True)
class Samples:
    """One array per field, all of length S, in global (time, user, item) order.

    `position` is the number of earlier behaviours of that user, and so the target's row in their history.
    """

    user: np.ndarray  # int32
    item: np.ndarray  # int32
    position: np.ndarray  # int32
    label: np.ndarray  # int8, 0 or 1
    time: np.ndarray  # int64
    split: np.ndarray  # str

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set of N items, U users, M behaviours and S samples.

    Attributes:
        meta: contents of dataset.json (name, counts, label rule, rating scale, feature columns).
        items, users: tables whose row is the dense id; `title`, `text` and `profile` are ready for prompts.
        behaviour_items, behaviour_ratings, behaviour_times: (M,), grouped by user and in history order.
        offsets: (U + 1,) int64; user u's history is rows offsets[u] to offsets[u + 1].
    """

    folder: Path
    meta: dict[str, Any]
    items: pa.Table
    users: pa.Table
    behaviour_items: np.ndarray  # int32
    behaviour_ratings: np.ndarray  # float32
    behaviour_times: np.ndarray  # int64
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
        items, users = _read(folder, "items"), _read(folder, "users")
        behaviours, samples = _read(folder, "behaviours"), _read(folder, "samples")
        owner = behaviours["user"].to_numpy()
        if np.any(np.diff(owner) < 0):
            raise InputError(
                f"{folder / 'behaviours.parquet'}: expected rows grouped by rising user, found others"
            )
        dataset = cls(
            folder=folder,
            meta=meta,
            items=items,
            users=users,
            behaviour_items=behaviours["item"].to_numpy(),
            behaviour_ratings=behaviours["rating"].to_numpy(),
            behaviour_times=behaviours["time"].to_numpy(),
            offsets=np.searchsorted(owner, np.arange(users.num_rows + 1)).astype(np.int64),
            samples=Samples(*(samples[name].to_numpy() for name in COLUMNS["samples"][1:])),
        )
        dataset._check(owner)
        return dataset

    def indices(self, split: str) -> np.ndarray:
        """All samples of a split, rising."""
        if split not in SPLITS:
            raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        return np.flatnonzero(self.samples.split == split)

    def choose(self, split: str, n: int | None, seed: int) -> np.ndarray:
        """`n` random samples of a split, rising; None takes all. With the same seed, a larger `n` only adds.

        Raises:
            InputError: the split has fewer than `n` samples.
        """
        indices = self.indices(split)
        if n is None:
            return indices
        if not 1 <= n <= len(indices):
            raise InputError(f"n: expected 1 to {len(indices)} samples of split {split!r}, got {n}")
        return np.sort(np.random.default_rng(seed).permutation(indices)[:n])

    def history(self, sample: int) -> slice:
        """Rows of the behaviours before `sample`'s target, oldest first."""
        start = int(self.offsets[self.samples.user[sample]])
        return slice(start, start + int(self.samples.position[sample]))

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

    def _check(self, owner: np.ndarray) -> None:
        samples, lengths = self.samples, np.diff(self.offsets)
        _check_ids(self.folder / "behaviours.parquet", "user", owner, len(lengths))
        _check_ids(self.folder / "behaviours.parquet", "item", self.behaviour_items, self.items.num_rows)
        _check_ids(self.folder / "samples.parquet", "user", samples.user, len(lengths))
        targets = self.offsets[samples.user] + samples.position
        wrong = (samples.position < 0) | (samples.position >= lengths[samples.user])
        wrong[~wrong] = self.behaviour_items[targets[~wrong]] != samples.item[~wrong]
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"{self.folder / 'samples.parquet'}: sample {row} (user {samples.user[row]}, item "
                f"{samples.item[row]}, position {samples.position[row]}) is not in behaviours.parquet"
            )


def _read(folder: Path, name: str) -> pa.Table:
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise InputError(f"{path}: expected a file of `rellax prepare`, found none")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: expected Parquet, but it is damaged ({error})") from None
    missing = [column for column in COLUMNS[name] if column not in table.column_names]
    if missing:
        raise InputError(f"{path}: expected column {missing[0]!r}, found {', '.join(table.column_names)}")
    return table


def _check_ids(path: Path, column: str, ids: np.ndarray, count: int) -> None:
    wrong = (ids < 0) | (ids >= count)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(f"{path}: row {row}: expected {column} in 0 to {count - 1}, found {ids[row]}")
