"""Probabilities for any (user, item, time): a table in, the same table with one more column out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from rellax._files import atomic_file
from rellax.ctr import crm
from rellax.ctr.config import TrainConfig, read_config
from rellax.ctr.dataset import Dataset, Samples
from rellax.ctr.evaluate import predict_probabilities
from rellax.ctr.llm import resolve_device
from rellax.ctr.retrieval import find_positions
from rellax.ctr.task import Inputs, Task
from rellax.errors import InputError, one_line

COLUMN = "probability"


def predict(
    run: str | Path,
    table: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> int:
    """Add the column `probability` to a table of users and items, and return its number of rows.

    A row's history is what its user did strictly before its time; without a column `time`, all that is known.

    Args:
        run: folder of `rellax train`.
        table: .parquet or .csv with columns user_id and item_id as in the raw data, and maybe time, integers.
        out: .parquet or .csv to write.
        data: folder of `rellax prepare`; None is the one of the run.

    Raises:
        InputError: a file is missing or has other columns, or a row has an unknown id, or a user without
            behaviours before its time; the row is named.
    """
    where = resolve_device(device)
    write = pyarrow.csv.write_csv if _suffix(Path(out)) == ".csv" else pq.write_table
    rows = read_table(table)
    config = read_config(run)
    dataset = Dataset.load(config.data if data is None else data)
    inputs = _inputs(config, dataset, _samples(rows, dataset, Path(table)))
    task = Task(config, inputs, Path(run) / "adapter", device=where)
    examples = task.examples(range(rows.num_rows), config.evaluation_prompts)
    probabilities = predict_probabilities(task.model, task.collator, examples, progress=progress)
    with atomic_file(out) as part:
        write(rows.append_column(COLUMN, pa.array(probabilities)), part)
    return rows.num_rows


def read_table(path: str | Path) -> pa.Table:
    """A .parquet or .csv table with user_id and item_id as strings, and time as int64 where it has one.

    Raises:
        InputError: it is missing, damaged or empty, or its columns are wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a table, found none")
    try:
        if _suffix(path) == ".csv":
            types = {"user_id": pa.string(), "item_id": pa.string(), "time": pa.int64()}
            convert = pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True)
            table = pa.csv.read_csv(path, convert_options=convert)
        else:
            table = pq.read_table(path)
        names = table.column_names  # decoded here
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{path}: expected a readable table, but {one_line(error)}") from None
    if not table.num_rows:
        raise InputError(f"{path}: expected at least one row, found none")
    if COLUMN in table.column_names:
        raise InputError(f"{path}: expected no column {COLUMN!r}, it is what is added")
    for name in ("user_id", "item_id", "time"):
        if names.count(name) > 1:
            raise InputError(f"{path}: expected one column {name!r}, found several")
        if name in table.column_names:
            table = _typed(table, name, path)
        elif name != "time":
            raise InputError(f"{path}: expected a column {name!r}, found {', '.join(table.column_names)}")
    return table


def _typed(table: pa.Table, name: str, path: Path) -> pa.Table:
    index = table.column_names.index(name)
    column, wanted = table[name], pa.int64() if name == "time" else pa.string()
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise InputError(f"{path}, row {row + 1}: expected a value of {name}, found none")
    if not pa.types.is_integer(column.type) and column.type not in (pa.string(), pa.large_string()):
        raise InputError(f"{path}: expected {name} as {wanted}, found {column.type}")
    try:
        return table.set_column(index, name, pc.cast(column, wanted))
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: expected {name} as {wanted} ({one_line(error)})") from None


def _samples(table: pa.Table, dataset: Dataset, path: Path) -> Samples:
    """The rows as samples, with the label -1."""
    user = _dense(table, "user", dataset.users, path)
    item = _dense(table, "item", dataset.items, path)
    position = np.diff(dataset.offsets)[user]
    if "time" in table.column_names:
        if not dataset.meta["timed"]:
            raise InputError(f"{path}: expected no column 'time', the data in {dataset.folder} have no times")
        time = table["time"].to_numpy()
        for row, (start, end) in enumerate(
            zip(dataset.offsets[user], dataset.offsets[user + 1], strict=True)
        ):
            position[row] = np.searchsorted(dataset.behaviour_times[start:end], time[row], side="left")
    if not position.all():
        row = int(np.flatnonzero(position == 0)[0])
        raise InputError(
            f"{path}, row {row + 1}: expected a user with behaviours before that time, "
            f"found none of {table['user_id'][row].as_py()!r}"
        )
    return Samples(
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        position=position.astype(np.int32),
        label=np.full(len(user), -1, dtype=np.int8),
        split=np.full(len(user), -1, dtype=np.int8),
    )


def _dense(table: pa.Table, kind: str, known: pa.Table, path: Path) -> np.ndarray:
    raw = table[f"{kind}_id"]
    dense = pc.fill_null(pc.index_in(raw, value_set=known[f"{kind}_id"].combine_chunks()), -1).to_numpy()
    if (dense < 0).any():
        row = int(np.flatnonzero(dense < 0)[0])
        raise InputError(f"{path}, row {row + 1}: {kind}_id {raw[row].as_py()!r} is not in the data")
    return dense


def _inputs(config: TrainConfig, dataset: Dataset, samples: Samples) -> Inputs:
    """What the run's prompts and gates need, computed for new samples."""
    new = replace(dataset, samples=samples)
    retrieved = instance_embeddings = None
    if config.evaluation_prompts == "retrieved":
        assert config.retrieved is not None, "TrainConfig asks for it with these prompts"
        retrieved = find_positions(config.retrieved, new, config.k)
    if config.crm is not None and config.interaction != "none":
        instance_embeddings = crm.instance_embeddings(config.crm, new)
    return Inputs(new, retrieved, instance_embeddings=instance_embeddings)


def _suffix(path: Path) -> str:
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: expected a file that ends in .csv or .parquet")
    return path.suffix
