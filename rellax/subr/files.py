"""The two files of retrieval: embeddings.safetensors and retrieved.parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rellax._files import atomic_file
from rellax.errors import InputError

_EMBEDDINGS = "embeddings.safetensors"
_ROW_GROUP = 1 << 16
_SCHEMA = pa.schema(
    [
        ("sample", pa.int32()),
        ("positions", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
    ]
)


def save_embeddings(folder: str | Path, embeddings: Tensor, item_ids: Sequence[str], model_name: str) -> None:
    """Write embeddings (N, D) fp32 to `folder`/embeddings.safetensors.

    Kept with them: the model's name and a hash of the N item ids, in row order.

    Raises:
        InputError: there are not as many ids as rows.
    """
    if embeddings.dim() != 2 or len(item_ids) != len(embeddings):
        raise InputError(
            f"embeddings: expected (N, D) for the N = {len(item_ids)} item ids, got {tuple(embeddings.shape)}"
        )
    metadata = {"model": model_name, "item_ids_sha256": _hash(item_ids)}
    with atomic_file(Path(folder) / _EMBEDDINGS) as part:
        save_file({"embeddings": embeddings.float().cpu().contiguous()}, part, metadata)


def load_embeddings(folder: str | Path, item_ids: Sequence[str] | None = None) -> Tensor:
    """The embeddings (N, D) fp32 that :func:`save_embeddings` wrote.

    Args:
        folder: where they are.
        item_ids: ids of the items they are wanted for, in row order; None takes them for whatever they are.

    Raises:
        InputError: there is no such file, it is damaged, or it was made for other items.
    """
    path = Path(folder) / _EMBEDDINGS
    if not path.is_file():
        raise InputError(f"{path}: expected the embeddings of `rellax embed`, found no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            embeddings: Tensor = file.get_tensor("embeddings")
    except SafetensorError as error:
        raise InputError(
            f"{path}: expected a safetensors file of embeddings, got a damaged one ({error})"
        ) from None
    if item_ids is not None and metadata.get("item_ids_sha256") != _hash(item_ids):
        raise InputError(
            f"{path}: expected embeddings of these {len(item_ids)} items, got those of other items"
        )
    return embeddings


class Retrieved(NamedTuple):
    """Retrieved behaviours of S samples.

    Attributes:
        sample: (S,) int32.
        positions: (S, k) int32 within the user's history, by falling similarity; -1 past the last.
        scores: (S, k) float32; -inf past the last.
    """

    sample: np.ndarray
    positions: np.ndarray
    scores: np.ndarray


def write_retrieved(
    path: str | Path, sample_ids: np.ndarray, positions: np.ndarray, scores: np.ndarray
) -> None:
    """Write what :func:`retrieve` gave for `sample_ids` (S,) as Parquet, a row group at a time.

    Columns: sample int32, positions list<int32>, scores list<float32>; lists hold real behaviours only.
    """
    schema = _SCHEMA.with_metadata({"k": str(positions.shape[1])})
    with atomic_file(path) as part, pq.ParquetWriter(part, schema) as writer:
        for start in range(0, len(sample_ids), _ROW_GROUP):
            rows = slice(start, start + _ROW_GROUP)
            writer.write_table(_table(sample_ids[rows], positions[rows], scores[rows], schema))


def read_retrieved(path: str | Path) -> Retrieved:
    """Read a file of :func:`write_retrieved`.

    Raises:
        InputError: there is no such file, or it is damaged or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected the behaviours of `rellax retrieve`, found no such file")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file, got a damaged one ({error})") from None
    metadata = table.schema.metadata or {}
    if not table.schema.equals(_SCHEMA) or b"k" not in metadata:
        raise InputError(f"{path}: expected the columns of `rellax retrieve`, got {table.column_names}")
    k = int(metadata[b"k"])
    return Retrieved(
        table["sample"].to_numpy(),
        _padded(table["positions"].combine_chunks(), k, np.int32(-1)),
        _padded(table["scores"].combine_chunks(), k, np.float32(-np.inf)),
    )


def _table(sample_ids: np.ndarray, positions: np.ndarray, scores: np.ndarray, schema: pa.Schema) -> pa.Table:
    real = positions >= 0
    bounds = np.concatenate([[0], real.sum(1).cumsum()]).astype(np.int32)
    columns = [
        pa.array(sample_ids.astype(np.int32)),
        pa.ListArray.from_arrays(bounds, positions[real].astype(np.int32)),
        pa.ListArray.from_arrays(bounds, scores[real].astype(np.float32)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _padded(lists: pa.ListArray, k: int, fill: np.generic) -> np.ndarray:
    counts = lists.value_lengths().to_numpy()
    out = np.full((len(lists), k), fill)
    out[np.arange(k) < counts[:, None]] = lists.flatten().to_numpy()
    return out


def _hash(item_ids: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(item_ids)).encode()).hexdigest()
