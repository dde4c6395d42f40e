"""Users hashed into buckets on disk, so that whatever works on users holds a bucket at a time.

A bucket is a range of the hash of the user's id: where other users come or go, it has the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rellax import subr
from rellax._files import atomic_folder, read_json, write_json
from rellax.ctr.stream import check_grouped, check_places, stream, stream_ids

_ROWS = 1 << 18
"""Behaviours or samples of a bucket, on average: what is held at once, and what a kill costs."""

_FOLDER = "buckets"
_HALF = np.uint64(32)


class Bucket(NamedTuple):
    """Histories of U users, in the order of the data, and their S samples, by rising (key, position).

    Attributes:
        keys: (U,) uint64.
        behaviour_items, offsets: as in `Dataset`.
        user: (S,) in [0, U).
        position, item, sample: (S,) int32, as in the table of samples.
    """

    keys: np.ndarray
    behaviour_items: np.ndarray
    offsets: np.ndarray
    user: np.ndarray
    position: np.ndarray
    item: np.ndarray
    sample: np.ndarray


@dataclass(frozen=True)
class Buckets:
    """All buckets of a data folder; some may be empty.

    Attributes:
        data: the data folder.
        folder: holds the buckets' files.
        samples: how many samples each bucket has.
        work: scores that each takes, the sum over its samples of their candidates: ΣH² / 2, where every
            behaviour is a target.
        longest: the most candidates of a sample.
    """

    data: Path
    folder: Path
    samples: list[int]
    work: list[int]
    longest: int

    @classmethod
    def load(cls, data: str | Path, folder: str | Path) -> Buckets:
        """The buckets in `folder`, made in one pass over each table of `data`, if they are not there yet.

        Raises:
            InputError: a table or column is missing, damaged, or has ids that are out of range.
        """
        data, folder = Path(data), Path(folder) / _FOLDER
        if not folder.exists():
            with atomic_folder(folder) as part:
                _sort(data, part)
        return cls(data, folder, **read_json(folder / "sizes.json"))

    def jobs(self) -> list[int]:
        """Buckets with samples, rising."""
        return [bucket for bucket, samples in enumerate(self.samples) if samples]

    def longest_first(self) -> list[int]:
        """The order in which workers that take the next one when they are free end at nearly one time."""
        return sorted(self.jobs(), key=lambda bucket: -self.work[bucket])

    def key_range(self, bucket: int) -> tuple[int, int]:
        """The lowest and the highest key of a bucket's users."""
        first, end = (-(-(number << 32) // len(self.samples)) << 32 for number in (bucket, bucket + 1))
        return first, end - 1

    @cached_property
    def _strictly_before(self) -> bool:
        return bool(read_json(self.data / "dataset.json").get("strictly_before", False))

    def read(self, bucket: int) -> Bucket:
        """One bucket.

        Raises:
            InputError: a sample's item is not where its position says in the user's history.
        """
        keys = np.memmap(self.folder / "keys", np.uint64, "r")
        owner, items = self._columns(bucket, "behaviours", 2)
        users, starts = np.unique(owner, return_index=True)
        end = len(owner)
        offsets = np.append(starts, [end, end])  # one more user without behaviours: for strangers
        columns = self._columns(bucket, "samples", 4)
        order = np.lexsort((columns[0], columns[3], keys[columns[1]]))
        sample, owner, item, position = columns[:, order]
        user = np.searchsorted(users, owner)
        user[np.append(users, -1)[user] != owner] = len(users)
        check_places(
            self.data / "samples.parquet",
            items,
            offsets,
            user,
            item,
            position,
            later=self._strictly_before,
            sample=sample,
            owner=owner,
        )
        return Bucket(keys[users], items, offsets[:-1], user, position, item, sample)

    def _columns(self, bucket: int, kind: str, columns: int) -> np.ndarray:
        path = self.folder / f"{bucket:06d}.{kind}"
        rows = np.fromfile(path, np.int32) if path.exists() else np.zeros(0, np.int32)
        return np.ascontiguousarray(rows.reshape(-1, columns).T)


def _sort(data: Path, folder: Path) -> None:
    """Append each behaviour and each sample to the file of its user's bucket, in the order of the tables."""
    rows = {name: _rows(data, name) for name in ("users", "items", "behaviours", "samples")}
    count = min(max(-(-max(rows["behaviours"], rows["samples"]) // _ROWS), 1), 1 << 16)
    with (folder / "keys").open("wb") as file:
        for batch in stream(data, "users", ("user_id",)):
            subr.user_keys(batch["user_id"].to_pylist()).tofile(file)
    keys = np.memmap(folder / "keys", np.uint64, "r")
    last = 0
    counts = {kind: rows[f"{kind}s"] for kind in ("user", "item")}
    for _, (owner, item) in stream_ids(data, "behaviours", ("user", "item"), counts):
        last = check_grouped(data / "behaviours.parquet", owner, last)
        _append(folder, "behaviours", _bucket(keys[owner], count), [owner, item])
    samples, work, longest = np.zeros(count, np.int64), np.zeros(count, np.int64), 0
    for start, (owner, item, position) in stream_ids(data, "samples", ("user", "item", "position"), counts):
        bucket = _bucket(keys[owner], count)
        sample = np.arange(start, start + len(owner), dtype=np.int32)
        _append(folder, "samples", bucket, [sample, owner, item, position])
        samples += np.bincount(bucket, minlength=count)
        work += np.bincount(bucket, position, minlength=count).astype(np.int64)
        longest = max(longest, int(position.max()))
    sizes = {"samples": samples.tolist(), "work": work.tolist(), "longest": longest}
    write_json(folder / "sizes.json", sizes)


def _rows(data: Path, name: str) -> int:
    return sum(batch.num_rows for batch in stream(data, name, ()))


def _bucket(keys: np.ndarray, count: int) -> np.ndarray:
    """The bucket of each key, (n,): equal ranges of the keys' upper halves."""
    return ((keys >> _HALF) * np.uint64(count) >> _HALF).astype(np.int64)


def _append(folder: Path, kind: str, bucket: np.ndarray, columns: list[np.ndarray]) -> None:
    order = np.argsort(bucket, kind="stable")
    rows = np.stack(columns, axis=1)[order]
    present, starts = np.unique(bucket[order], return_index=True)
    for number, block in zip(present, np.split(rows, starts[1:]), strict=True):
        with (folder / f"{number:06d}.{kind}").open("ab") as file:
            block.tofile(file)
