"""Tables of the data folder, read some rows at a time, and what holds for their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax.errors import InputError, one_line

_ROWS = 1 << 20
"""Rows that are read, or checked, at once."""


class Table:
    """A Parquet file of the data folder.

    Raises:
        InputError: the file or one of `columns` is missing, or, then or later, it is found to be damaged.
    """

    def __init__(self, folder: str | Path, name: str, columns: Sequence[str]) -> None:
        self.path = Path(folder) / f"{name}.parquet"
        if not self.path.is_file():
            raise InputError(f"{self.path}: expected a file of `rellax prepare`, found none")
        try:
            self.file = pq.ParquetFile(self.path, pre_buffer=False)  # or it holds the columns whole
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise self.damaged(error) from None
        self.rows: int = self.file.metadata.num_rows
        found = self.file.schema_arrow.names
        missing = [column for column in columns if column not in found]
        if missing:
            raise InputError(
                f"{self.path}: expected column {missing[0]!r}, found {one_line(', '.join(found))}"
            )

    def read(self) -> pa.Table:
        """All of it."""
        try:
            return self.file.read()
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise self.damaged(error) from None

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, some rows at a time."""
        try:
            yield from self.file.iter_batches(_ROWS, columns=list(columns))
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise self.damaged(error) from None

    def values(self, column: str, values: pa.Array) -> np.ndarray:
        """Part of a column as an array; a row without a value is an InputError."""
        if values.null_count:
            raise InputError(f"{self.path}: expected a value of {column!r} in every row, found none")
        return values.to_numpy(zero_copy_only=False)

    def damaged(self, error: Exception) -> InputError:
        return InputError(f"{self.path}: expected Parquet, but it is damaged ({one_line(error)})")


def stream(folder: str | Path, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of one of a data folder's tables, some rows at a time.

    Raises:
        InputError: as :class:`Table`.
    """
    yield from Table(folder, name, columns).batches(columns)


def stream_ids(
    folder: str | Path, name: str, columns: Sequence[str], counts: dict[str, int]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The first row and the columns, as int32 arrays, of some rows of a table at a time.

    Raises:
        InputError: as :class:`Table`, a row has no value, or an id of a column that `counts` names is not in
            [0, count).
    """
    table, start = Table(folder, name, columns), 0
    for batch in table.batches(columns):
        arrays = {column: table.values(column, batch[column]).astype(np.int32) for column in columns}
        for column, count in counts.items():
            check_ids(table.path, column, arrays[column], count, start)
        if batch.num_rows:
            yield start, list(arrays.values())
        start += batch.num_rows


def check_ids(path: Path, column: str, ids: np.ndarray, count: int, first_row: int = 0) -> None:
    """Raise an InputError unless all ids are in [0, count)."""
    for start in range(0, len(ids), _ROWS):
        block = ids[start : start + _ROWS]
        wrong = (block < 0) | (block >= count)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{path}: row {first_row + start + row}: expected {column} in 0 to {count - 1}, "
                f"found {block[row]}"
            )


def check_grouped(path: Path, users: np.ndarray, last: int) -> int:
    """Raise an InputError unless users only rise, from `last` of the rows before; the last of these rows."""
    if np.any(np.diff(users, prepend=last) < 0):
        raise InputError(f"{path}: expected rows grouped by rising user, found others")
    return int(users[-1]) if len(users) else last


def check_places(
    path: Path,
    behaviour_items: np.ndarray,
    offsets: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    position: np.ndarray,
    *,
    later: bool,
    sample: np.ndarray | None = None,
    owner: np.ndarray | None = None,
) -> None:
    """Raise an InputError unless samples' items are at their positions in the histories.

    Args:
        path: of the samples.
        behaviour_items, offsets: (M,), (U + 1,), as in `Dataset`.
        user, item, position: (S,); a user's number is that of their histories.
        later: a target may also stand after its position.
        sample, owner: (S,) what the error calls a sample and its user, where their rows do not say it.
    """
    for start in range(0, len(user), _ROWS):
        block = slice(start, start + _ROWS)
        row, end = offsets[user[block]] + position[block], offsets[user[block] + 1]
        wrong = np.ones(len(row), dtype=bool)
        left = np.flatnonzero((position[block] >= 0) & (row < end))
        while len(left):
            found = behaviour_items[row[left]] == item[block][left]
            wrong[left[found]] = False
            if not later:
                break
            left = left[~found]
            row[left] += 1
            left = left[row[left] < end[left]]
        if wrong.any():
            at = start + int(np.argmax(wrong))
            raise InputError(
                f"{path}: sample {at if sample is None else sample[at]} "
                f"(user {(user if owner is None else owner)[at]}, item {item[at]}, "
                f"position {position[at]}) is not in behaviours.parquet"
            )
