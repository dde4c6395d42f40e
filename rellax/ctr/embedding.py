"""The folder of `rellax embed`: a semantic embedding of every item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from rellax import subr
from rellax._files import atomic_file, atomic_folder, read_json
from rellax.ctr import jobs, runs
from rellax.ctr.crm import load_crm
from rellax.ctr.dataset import Dataset
from rellax.ctr.llm import load_config, load_encoder, load_tokenizer, model_hash, resolve_device
from rellax.ctr.stream import stream
from rellax.ops._check import check_count

_BLOCK_ITEMS = 2048
"""Items of a job: what a kill costs at most."""


def embed(
    config: dict[str, Any],
    folder: str | Path,
    *,
    device: str = "auto",
    redo: bool = False,
    cluster: jobs.Cluster | None = None,
    progress: bool = True,
) -> None:
    """Embed every item's text with a language model, and write unit rows to `folder`, if not done yet.

    Items are taken in order of their length, block by block, and hidden states wait in files beside `folder`:
    neither they nor the model's output are ever held for all items, and a run that was killed goes on after
    its last whole block. Where items' ids, their texts or the model have changed, it is done anew.

    Args:
        config: `data` (folder of `rellax prepare`), `model`, `dim` (principal components that are kept), and
            maybe `crm` (folder of `rellax crm`): its item embeddings, centred, stand beside those of the
            text, and a cosine is then the mean of both similarities. What a text does not say, who likes
            an item, is in them.
        folder: gets embeddings.safetensors, config.json, inputs.json and environment.json.
        device: "auto", "cpu" or "cuda".
        redo: do it anew.
        cluster: run on Ray, whose nodes share this file system; None runs here.

    Raises:
        InputError: no data folder, model or CRM there, or `folder` holds something else, or another process
            works there.
    """
    check_count("dim", config["dim"])
    claimed = runs.is_claimed(folder, config, command="embed", redo=redo)
    where = resolve_device(device if cluster is None else "auto")
    read_json(Path(config["data"]) / "dataset.json", maker="rellax prepare")
    ids, texts = _items(config["data"])
    inputs = {"items": _hash(ids, texts), "weights": model_hash(config["model"])}
    liked = None
    if config.get("crm") is not None:
        liked = load_crm(config["crm"], Dataset.load(config["data"])).item_embeddings
        inputs["crm"] = hashlib.sha256(liked.numpy().tobytes()).hexdigest()
    if claimed and runs.has_inputs(folder, inputs):
        return
    lengths = subr.token_lengths(texts, load_tokenizer(config["model"]))
    subr.check_lengths(lengths, load_config(config["model"]), ids)
    plan = {"config": config, "inputs": inputs, "block": _BLOCK_ITEMS}
    with jobs.parts_folder(folder, plan) as parts:
        np.save(parts / "order.npy", np.argsort(-lengths, kind="stable"))
        blocks = range(-(-len(ids) // _BLOCK_ITEMS))
        missing = [block for block in blocks if not _part(parts, block).exists()]
        model = Path(config["model"]).resolve() if Path(config["model"]).is_dir() else config["model"]
        arguments = (str(parts), str(Path(config["data"]).resolve()), str(model), device, _BLOCK_ITEMS)
        with tqdm(total=len(ids), desc="embed", unit="item", disable=not progress) as bar:
            bar.update(len(ids) - sum(len(_rows(parts, block, _BLOCK_ITEMS)) for block in missing))
            for done in jobs.run(_Embedder, arguments, missing, cluster):
                bar.update(done["items"])
        with atomic_folder(folder) as part:
            files = [_part(parts, block) for block in blocks]
            embeddings = _reduced(files, len(ids), config["dim"], where, progress=progress)
            if liked is not None:
                embeddings = normalize(torch.cat([embeddings, normalize(liked - liked.mean(0))], dim=1))
            hashes = {f"{name}_sha256": value for name, value in inputs.items()}
            subr.save_embeddings(part, embeddings, ids, Path(config["model"]).name, **hashes)
            runs.write_record(part, config, inputs)


class _Embedder:
    """Writes the mean hidden states of one block of items after another."""

    def __init__(self, parts: str, data: str, model: str, device: str, size: int) -> None:
        self.parts, self.texts, self.size = Path(parts), _items(data)[1], size
        self.model = load_encoder(model).to(resolve_device(device))
        self.tokenizer = load_tokenizer(model)

    def __call__(self, row: jobs.Row) -> jobs.Row:
        rows = _rows(self.parts, row["job"], self.size)
        texts = [self.texts[i] for i in rows.tolist()]
        states = subr.embed_items(texts, self.model, self.tokenizer, progress=False)
        with atomic_file(_part(self.parts, row["job"])) as part:
            save_file({"rows": torch.from_numpy(rows), "states": states}, part)
        return {"items": len(rows)}


def _reduced(files: list[Path], items: int, dim: int, device: torch.device, *, progress: bool) -> Tensor:
    """Unit rows (N, D) along the principal components of the states in `files`, in the items' order."""

    def blocks(what: str) -> Iterator[dict[str, Tensor]]:
        for file in tqdm(files, desc=what, unit="block", disable=not progress):
            yield load_file(file, device=str(device))

    fitted = subr.PCA.fit((block["states"] for block in blocks("covariance")), dim)
    embeddings = torch.empty((items, len(fitted.components)))
    for block in blocks("project"):
        embeddings[block["rows"].cpu()] = fitted.project(block["states"]).cpu()
    return embeddings


def _rows(parts: Path, block: int, size: int) -> np.ndarray:
    order = np.load(parts / "order.npy", mmap_mode="r")
    return np.array(order[block * size : (block + 1) * size])


def _part(parts: Path, block: int) -> Path:
    return parts / f"{block:06d}.safetensors"


def _items(data: str | Path) -> tuple[list[str], list[str]]:
    """Ids and texts of all items."""
    ids: list[str] = []
    texts: list[str] = []
    for batch in stream(data, "items", ("item_id", "text")):
        ids += batch["item_id"].to_pylist()
        texts += batch["text"].to_pylist()
    return ids, texts


def _hash(ids: list[str], texts: list[str]) -> str:
    digest = hashlib.sha256()
    for pair in zip(ids, texts, strict=True):
        digest.update(json.dumps(pair).encode())
    return digest.hexdigest()
