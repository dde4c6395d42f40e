"""The folder of `rellax retrieve`: for each sample the nearest behaviours of its user's history.

Users are hashed into buckets, which are jobs: none needs another, and what one takes is bounded, however many
there are. Buckets are ranges of the hash, by which the result is sorted: where there is an earlier one, a
bucket reads its own rows back and computes only those whose history key has changed or is new.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from torch import Tensor
from tqdm import tqdm

from rellax import subr
from rellax._files import atomic_folder, located, read_json, scratch_array, sha256_file, write_place
from rellax.ctr import jobs, runs
from rellax.ctr.buckets import Buckets
from rellax.ctr.dataset import Dataset
from rellax.ctr.llm import resolve_device
from rellax.ctr.stream import stream
from rellax.errors import InputError
from rellax.ops._check import check_count

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings.safetensors"
_FILE = "retrieved.parquet"
_TABLES = ("users", "behaviours", "samples")


def retrieve(
    config: dict[str, Any],
    folder: str | Path,
    *,
    device: str = "auto",
    redo: bool = False,
    cluster: jobs.Cluster | None = None,
    progress: bool = True,
) -> None:
    """Find the behaviours nearest to every sample's target, and write them to `folder`, if not done yet.

    Where the data has changed since, rows of the earlier result whose history and target are the same are
    kept, and only the others are computed. Memory is bounded by the embeddings and the longest history,
    whatever the number of users and samples.

    Args:
        config: `data` (folder of `rellax prepare`), `embeddings` (of `rellax embed`), `k` (most a sample),
            and maybe `scores` (True keeps them as well).
        folder: gets retrieved.parquet, config.json, inputs.json, environment.json and place.json.
        device: "auto", "cpu" or "cuda".
        redo: do it anew.
        cluster: run on Ray, whose nodes share this file system; None runs here.

    Raises:
        InputError: a folder is missing, the embeddings are of other items, `folder` holds something else, or
            another process works there.
    """
    check_count("k", config["k"])
    claimed = runs.is_claimed(folder, config, command="retrieve", redo=redo)
    if cluster is None:
        resolve_device(device)
    data, embeddings = Path(config["data"]).resolve(), Path(config["embeddings"]).resolve()
    read_json(data / "dataset.json", maker="rellax prepare")
    subr.check_embeddings(embeddings, _item_ids(data))
    files = [*(data / f"{name}.parquet" for name in _TABLES), embeddings / EMBEDDINGS]
    inputs = {path.name: sha256_file(path) for path in files}
    if claimed and runs.has_inputs(folder, inputs):
        return
    earlier = _earlier(Path(folder).resolve() / _FILE, inputs) if claimed else None
    with jobs.parts_folder(folder, {"config": config, "inputs": inputs}) as parts:
        buckets = Buckets.load(data, parts)
        schema = subr.retrieved_schema(config["k"], buckets.longest, scores=config.get("scores", False))
        missing = [bucket for bucket in buckets.longest_first() if not _part(parts, bucket).exists()]
        samples, left = sum(buckets.samples), sum(buckets.samples[bucket] for bucket in missing)
        arguments = (str(parts), str(data), str(embeddings), schema, earlier, device)
        computed = 0
        with tqdm(total=samples, desc="retrieve", unit="sample", disable=not progress) as bar:
            bar.update(samples - left)
            for done in jobs.run(_Retriever, arguments, missing, cluster):
                bar.update(done["samples"])
                computed += done["computed"]
        if earlier is not None:
            logger.info("retrieve: %s of %s rows computed, the others kept", f"{computed:,}", f"{left:,}")
        with atomic_folder(folder) as part:
            files = [_part(parts, bucket) for bucket in buckets.jobs()]
            subr.write_retrieved(part / _FILE, map(pq.read_table, files), schema)
            runs.write_record(part, config, inputs)
            write_place(part)


class _Retriever:
    """Writes the rows of one bucket after another; the embeddings are loaded once."""

    def __init__(
        self, parts: str, data: str, embeddings: str, schema: pa.Schema, earlier: str | None, device: str
    ) -> None:
        self.parts, self.schema, self.k = Path(parts), schema, subr.retrieved_k(parts, schema)
        self.buckets = Buckets.load(data, self.parts)
        self.embeddings = subr.load_embeddings(embeddings).to(resolve_device(device))
        self.earlier: Any = None if earlier is None else pyarrow.dataset.dataset(earlier)

    def __call__(self, row: jobs.Row) -> jobs.Row:
        bucket = self.buckets.read(row["job"])
        shape = (len(bucket.sample), self.k)
        user, history = bucket.keys[bucket.user], subr.history_keys(*bucket[:-1])
        positions, scores = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        new = np.ones(shape[0], dtype=bool)
        if self.earlier is not None:
            old = self._earlier_rows(row["job"])
            kept, rows = _matches(old, user, history)
            positions[kept], new[kept] = old.positions[rows], False
            if old.scores is not None:
                scores[kept] = old.scores[rows]
        if new.any():
            positions[new], scores[new] = subr.retrieve(
                self.embeddings,
                bucket.behaviour_items,
                bucket.offsets,
                bucket.user[new],
                bucket.position[new],
                bucket.item[new],
                self.k,
            )
        found = subr.Retrieved(bucket.sample, user, history, positions, scores)
        table = subr.retrieved_table(found, self.schema)
        subr.write_retrieved(_part(self.parts, row["job"]), [table], self.schema)
        return {"samples": shape[0], "computed": int(new.sum())}

    def _earlier_rows(self, bucket: int) -> subr.Retrieved:
        """Rows of the earlier result that are of this bucket's users."""
        low, high = (pa.scalar(key, pa.uint64()) for key in self.buckets.key_range(bucket))
        user = pyarrow.dataset.field("user")
        try:
            table = self.earlier.to_table(filter=(user >= low) & (user <= high))
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.earlier.files[0]}: expected the earlier result, got a damaged one ({error}); "
                "`rellax retrieve --redo` makes it anew"
            ) from None
        return subr.retrieved_block(table, self.k)


def _matches(old: subr.Retrieved, user: np.ndarray, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `user` and `history` that `old` has, and where in it."""
    order = np.argsort(old.history)
    at = np.searchsorted(old.history[order], history)
    kept = np.flatnonzero(at < len(order))
    rows = order[at[kept]]
    same = (old.history[rows] == history[kept]) & (old.user[rows] == user[kept])
    return kept[same], rows[same]


def read_positions(folder: str | Path, dataset: Dataset, k: int, *, progress: bool = False) -> np.ndarray:
    """Positions (S, k) of each sample's `k` nearest behaviours in its user's history, nearest first, then -1.

    int16 where all histories are short enough, else int32. Many are mapped from a temporary file (in $TMPDIR)
    that has no name: the system may put them out of memory.

    Raises:
        InputError: the file is missing or damaged, was made from other samples, or has fewer than `k`
            behaviours for one.
    """
    path, samples = Path(folder) / _FILE, dataset.samples
    keys = subr.history_keys(
        subr.user_keys(dataset.users["user_id"].to_pylist()),
        dataset.behaviour_items,
        dataset.offsets,
        samples.user,
        samples.position,
        samples.item,
    )
    short = samples.position.max(initial=0) <= np.iinfo(np.int16).max
    positions = scratch_array((len(samples), k), np.int16 if short else np.int32)
    left = np.ones(len(samples), dtype=bool)
    for block in tqdm(subr.read_retrieved(path), "retrieved", unit="block", disable=not progress, delay=2):
        if k > block.positions.shape[1]:
            raise InputError(
                f"k: expected at most the {block.positions.shape[1]} behaviours of {path}, got {k}; "
                f"`rellax retrieve --k {k} --redo` finds more"
            )
        known = block.sample < len(samples)
        if not known.all() or (block.history != keys[block.sample]).any():
            break
        positions[block.sample] = block.positions[:, :k]
        left[block.sample] = False
    if left.any():
        raise InputError(
            f"{path}: expected the {len(samples)} samples of {dataset.folder}, found others; "
            "`rellax retrieve` brings it up to date"
        )
    return positions


def load_embeddings(folder: str | Path, dataset: Dataset) -> Tensor:
    """The embeddings (N, D) of the items of `dataset` that a folder of `rellax retrieve` was made with.

    Raises:
        InputError: a file is missing or damaged, or the embeddings are of other items.
    """
    return subr.load_embeddings(embeddings_folder(folder), dataset.items["item_id"].to_pylist())


def embeddings_folder(folder: str | Path) -> Path:
    """The folder of the embeddings that a folder of `rellax retrieve` was made with."""
    return Path(
        located(folder, read_json(Path(folder) / "config.json", maker="rellax retrieve")["embeddings"])
    )


def retrieved_by(folder: str | Path) -> str:
    """SHA-256 of the embeddings that a folder of `rellax retrieve` was made with."""
    return str(read_json(Path(folder) / "inputs.json", maker="rellax retrieve")[EMBEDDINGS])


def find_positions(embeddings: Tensor, dataset: Dataset, k: int) -> np.ndarray:
    """As `read_positions`, computed for any samples."""
    samples = dataset.samples
    return subr.retrieve(
        embeddings,
        dataset.behaviour_items,
        dataset.offsets,
        samples.user,
        samples.position,
        samples.item,
        k,
    )[0]


def _earlier(path: Path, inputs: dict[str, str]) -> str | None:
    """An earlier result whose rows may be kept: of the same embeddings, and readable by this version."""
    try:
        same = retrieved_by(path.parent) == inputs[EMBEDDINGS]
        subr.retrieved_k(path, pq.read_schema(path))
    except (InputError, KeyError, pa.ArrowException, OSError):
        return None
    return str(path) if same else None


def _item_ids(data: Path) -> list[str]:
    return [value for batch in stream(data, "items", ("item_id",)) for value in batch["item_id"].to_pylist()]


def _part(parts: Path, bucket: int) -> Path:
    return parts / f"{bucket:06d}.parquet"
