"""Tables of the data folder, some rows at a time: for what has no room for a `Dataset`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax.errors import InputError, one_line

_ROWS = 1 << 20
"""Rows that are read at once."""


def stream(folder: str | Path, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of one of a data folder's tables, some rows at a time.

    Raises:
        InputError: the file or a column is missing, or it is damaged.
    """
    path = Path(folder) / f"{name}.parquet"
    if not path.is_file():
        raise InputError(f"{path}: expected a file of `rellax prepare`, found none")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # or it holds the columns whole
            names = file.schema_arrow.names
            missing = [column for column in columns if column not in names]
            if missing:
                raise InputError(
                    f"{path}: expected column {missing[0]!r}, found {one_line(', '.join(names))}"
                )
            yield from file.iter_batches(_ROWS, columns=list(columns))
    except pa.ArrowException as error:
        raise InputError(f"{path}: expected Parquet, but it is damaged ({error})") from None


def stream_ids(
    folder: str | Path, name: str, columns: Sequence[str], counts: dict[str, int]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The first row and the columns, as int32 arrays, of some rows of a table at a time.

    Raises:
        InputError: as :func:`stream`, or an id of a column that `counts` names is not in [0, count).
    """
    start = 0
    for batch in stream(folder, name, columns):
        arrays = {column: batch[column].to_numpy().astype(np.int32) for column in columns}
        for column, count in counts.items():
            wrong = (arrays[column] < 0) | (arrays[column] >= count)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise InputError(
                    f"{Path(folder) / name}.parquet: row {start + row}: expected {column} "
                    f"in 0 to {count - 1}, found {arrays[column][row]}"
                )
        if batch.num_rows:
            yield start, list(arrays.values())
        start += batch.num_rows
