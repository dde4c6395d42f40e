"""The folders of `rellax embed` and `rellax retrieve`: items' embeddings, samples' nearest behaviours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rellax import subr
from rellax._files import atomic_folder, read_json, write_json
from rellax.ctr import runs
from rellax.ctr.dataset import Dataset
from rellax.ctr.llm import load_model, load_tokenizer, resolve_device
from rellax.errors import InputError

_FILE = "retrieved.parquet"


def embed(
    config: dict[str, Any],
    folder: str | Path,
    *,
    device: str = "auto",
    redo: bool = False,
    progress: bool = True,
) -> None:
    """Embed every item's text with a language model, and write unit rows to `folder`, if not done yet.

    Args:
        config: `data` (folder of `rellax prepare`), `model`, `dim` (principal components that are kept).
        folder: gets embeddings.safetensors, config.json and environment.json.
        redo: do it anew.

    Raises:
        InputError: no data folder or model there, or `folder` holds something else.
    """
    if runs.is_claimed(folder, config, redo=redo):
        return
    where = resolve_device(device)
    dataset = Dataset.load(config["data"])
    model, tokenizer = load_model(config["model"]).to(where), load_tokenizer(config["model"])
    states = subr.embed_items(dataset.items["text"].to_pylist(), model, tokenizer, progress=progress)
    with atomic_folder(folder) as part:
        item_ids = dataset.items["item_id"].to_pylist()
        subr.save_embeddings(part, subr.pca(states, config["dim"]), item_ids, Path(config["model"]).name)
        write_json(part / "environment.json", runs.environment())
        write_json(part / "config.json", config)


def retrieve(config: dict[str, Any], folder: str | Path, *, redo: bool = False) -> None:
    """Find the behaviours nearest to every sample's target, and write them to `folder`, if not done yet.

    Args:
        config: `data` (folder of `rellax prepare`), `embeddings` (of `rellax embed`), `k` (most a sample).
        folder: gets retrieved.parquet, config.json and environment.json.
        redo: do it anew.

    Raises:
        InputError: a folder is missing, the embeddings are of other items, or `folder` holds something else.
    """
    if runs.is_claimed(folder, config, redo=redo):
        return
    dataset = Dataset.load(config["data"])
    positions, scores = _nearest(dataset, config["embeddings"], config["k"])
    with atomic_folder(folder) as part:
        subr.write_retrieved(part / _FILE, np.arange(len(dataset.samples)), positions, scores)
        write_json(part / "environment.json", runs.environment())
        write_json(part / "config.json", config)


def read_positions(folder: str | Path, dataset: Dataset, k: int) -> np.ndarray:
    """Positions (S, k) of each sample's `k` nearest behaviours in its user's history, nearest first, then -1.

    Raises:
        InputError: the file is missing or damaged, has other samples, or fewer than `k` behaviours for one.
    """
    path = Path(folder) / _FILE
    found = subr.read_retrieved(path)
    if not np.array_equal(found.sample, np.arange(len(dataset.samples))):
        raise InputError(
            f"{path}: expected the {len(dataset.samples)} samples of {dataset.folder}, found others"
        )
    if k > found.positions.shape[1]:
        raise InputError(f"k: expected at most the {found.positions.shape[1]} behaviours of {path}, got {k}")
    return found.positions[:, :k]


def find_positions(folder: str | Path, dataset: Dataset, k: int) -> np.ndarray:
    """As `read_positions`, computed for any samples with the embeddings that `folder` was made with."""
    return _nearest(
        dataset, read_json(Path(folder) / "config.json", maker="rellax retrieve")["embeddings"], k
    )[0]


def _nearest(dataset: Dataset, embeddings_folder: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    embeddings = subr.load_embeddings(embeddings_folder, dataset.items["item_id"].to_pylist())
    samples = dataset.samples
    return subr.retrieve(
        embeddings,
        dataset.behaviour_items,
        dataset.offsets,
        samples.user,
        samples.position,
        samples.item,
        k,
    )
