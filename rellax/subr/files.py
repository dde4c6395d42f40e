"""The two files of retrieval: embeddings.safetensors and retrieved.parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rellax._files import atomic_file
from rellax.errors import InputError, one_line

_EMBEDDINGS = "embeddings.safetensors"
_ROW_GROUP = 1 << 16


def save_embeddings(
    folder: str | Path, embeddings: Tensor, item_ids: Sequence[str], model_name: str, **metadata: str
) -> None:
    """Write embeddings (N, D) fp32 to `folder`/embeddings.safetensors.

    Kept with them: the N item ids in row order (`item_ids`, their UTF-8 bytes one after another, and
    `item_id_ends` (N,) int64; :func:`load_item_ids` reads them), and as metadata their hash, the model's
    name and what else is given.

    Raises:
        InputError: there are not as many ids as rows.
    """
    if embeddings.dim() != 2 or len(item_ids) != len(embeddings):
        raise InputError(
            f"embeddings: expected (N, D) for the N = {len(item_ids)} item ids, got {tuple(embeddings.shape)}"
        )
    encoded = [item_id.encode() for item_id in item_ids]
    tensors = {
        "embeddings": embeddings.float().cpu().contiguous(),
        "item_ids": torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()),
        "item_id_ends": torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0),
    }
    metadata = {"model": model_name, "item_ids_sha256": _hash(item_ids), **metadata}
    with atomic_file(Path(folder) / _EMBEDDINGS) as part:
        save_file(tensors, part, metadata)


def load_embeddings(folder: str | Path, item_ids: Sequence[str] | None = None) -> Tensor:
    """The embeddings (N, D) fp32 that :func:`save_embeddings` wrote.

    Args:
        folder: where they are.
        item_ids: ids of the items they are wanted for, in row order; None takes them for whatever they are.

    Raises:
        InputError: there is no such file, it is damaged, or it was made for other items.
    """
    if item_ids is not None:
        _check_items(
            folder,
            item_ids,
            "a run knows the items that it was trained with, new ones need embeddings and a run of their own",
        )
    return _read_embeddings(folder, "embeddings")[1]["embeddings"]


def check_embeddings(folder: str | Path, item_ids: Sequence[str]) -> None:
    """Raise as :func:`load_embeddings` does, without reading the embeddings, which may be made anew."""
    _check_items(folder, item_ids, "`rellax embed` makes them anew")


def load_item_ids(folder: str | Path) -> list[str]:
    """The ids of the rows of :func:`load_embeddings`.

    Raises:
        InputError: there is no such file, it is damaged, or of a version that kept no ids.
    """
    _, tensors = _read_embeddings(folder, "item_ids", "item_id_ends")
    text, ends = tensors["item_ids"].numpy().tobytes(), tensors["item_id_ends"].tolist()
    return [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def _check_items(folder: str | Path, item_ids: Sequence[str], remedy: str) -> None:
    metadata, _ = _read_embeddings(folder)
    if metadata.get("item_ids_sha256") != _hash(item_ids):
        raise InputError(
            f"{Path(folder) / _EMBEDDINGS}: expected embeddings of these {len(item_ids)} items, got those of "
            f"other items; {remedy}"
        )


def _read_embeddings(folder: str | Path, *names: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    path = Path(folder) / _EMBEDDINGS
    if not path.is_file():
        raise InputError(f"{path}: expected the embeddings of `rellax embed`, found no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: expected a file of `rellax embed`, got one that is damaged or of an earlier version "
            f"({one_line(error)})"
        ) from None


def _hash(item_ids: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(item_ids)).encode()).hexdigest()


class Retrieved(NamedTuple):
    """Retrieved behaviours of S samples.

    Attributes:
        sample: (S,) int32, row of the table of samples.
        user: (S,) uint64, as :func:`user_keys` gives; rows are in rising order of it, then of the position.
        history: (S,) uint64, as :func:`history_keys` gives: of all that the row was computed from.
        positions: (S, k) integers within the user's history, by falling similarity; -1 past the last.
        scores: (S, k) float32, -inf past the last; None where they are not kept.
    """

    sample: np.ndarray
    user: np.ndarray
    history: np.ndarray
    positions: np.ndarray
    scores: np.ndarray | None = None


def retrieved_schema(k: int, longest: int, *, scores: bool = False) -> pa.Schema:
    """Columns of retrieved.parquet for `k` behaviours of histories of at most `longest`."""
    position = pa.uint16() if longest <= 1 << 16 else pa.uint32()
    columns = {
        "sample": pa.int32(),
        "user": pa.uint64(),
        "history": pa.uint64(),
        "positions": pa.list_(position),
        "scores": pa.list_(pa.float32()),
    }
    names = [name for name in columns if scores or name != "scores"]
    return pa.schema([(name, columns[name]) for name in names], metadata={"k": str(k)})


def retrieved_table(block: Retrieved, schema: pa.Schema) -> pa.Table:
    """Rows as they are written: their lists hold real behaviours only."""
    real = block.positions >= 0
    bounds = np.concatenate([[0], real.sum(1).cumsum()]).astype(np.int32)
    columns: list[pa.Array] = [pa.array(column) for column in block[:3]]
    for name in schema.names[3:]:
        values = pa.array(getattr(block, name)[real]).cast(schema.field(name).type.value_type)
        columns.append(pa.ListArray.from_arrays(bounds, values))
    return pa.Table.from_arrays(columns, schema=schema)


def write_retrieved(path: str | Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables of :func:`retrieved_table` as Parquet, one after another."""
    with atomic_file(path) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=_ROW_GROUP)


def read_retrieved(path: str | Path) -> Iterator[Retrieved]:
    """The rows of a file of :func:`write_retrieved`, a block at a time.

    Raises:
        InputError: there is no such file, or it is damaged or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected the behaviours of `rellax retrieve`, found no such file")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # or it holds the columns whole
            k = retrieved_k(path, file.schema_arrow)
            for batch in file.iter_batches(_ROW_GROUP):
                yield retrieved_block(pa.Table.from_batches([batch]), k)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: expected a Parquet file, got a damaged one ({one_line(error)})") from None


def retrieved_k(path: str | Path, schema: pa.Schema) -> int:
    """How many behaviours a row of such a file has, at most.

    Raises:
        InputError: the columns are others.
    """
    names = retrieved_schema(1, 1).names
    if schema.names[: len(names)] != names or b"k" not in (schema.metadata or {}):
        raise InputError(
            f"{path}: expected the columns of `rellax retrieve`, got {schema.names}; "
            "where an earlier version wrote it, the same command writes it anew"
        )
    return int(schema.metadata[b"k"])


def retrieved_block(table: pa.Table, k: int) -> Retrieved:
    """Rows of retrieved.parquet as arrays."""
    positions = _padded(table["positions"].combine_chunks(), k, np.int32(-1))
    scores = None
    if "scores" in table.column_names:
        scores = _padded(table["scores"].combine_chunks(), k, np.float32(-np.inf))
    sample, user, history = (table[name].to_numpy() for name in ("sample", "user", "history"))
    return Retrieved(sample, user, history, positions, scores)


def _padded(lists: pa.ListArray, k: int, fill: np.generic) -> np.ndarray:
    counts = lists.value_lengths().to_numpy()
    out = np.full((len(lists), k), fill)
    out[np.arange(k) < counts[:, None]] = lists.flatten().to_numpy()
    return out
