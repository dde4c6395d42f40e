"""`rellax embed`: hidden states wait in files, and what was done survives a stop."""

from __future__ import annotations

import errno
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from workspace import ITEMS, Workspace, make_model

from rellax import subr
from rellax.ctr import embedding, runs
from rellax.ctr.crm import load_crm
from rellax.ctr.dataset import Dataset
from rellax.ctr.embedding import embed
from rellax.ctr.llm import load_encoder, load_tokenizer
from rellax.errors import InputError

DIM, BLOCK = 6, 7
BLOCKS = -(-ITEMS // BLOCK)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_BLOCK_ITEMS", BLOCK)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each block that was run."""
    blocks: list[list[str]] = []

    def counting(texts: list[str], *arguments: Any, **more: Any) -> Any:
        blocks.append(texts)
        return original(texts, *arguments, **more)

    original = subr.embed_items
    monkeypatch.setattr(subr, "embed_items", counting)
    return blocks


def config(workspace: Workspace, **changes: Any) -> dict[str, Any]:
    return {"data": str(workspace.data), "model": str(workspace.model), "dim": DIM} | changes


def test_a_classical_model_beside_the_text(workspace: Workspace, tmp_path: Path) -> None:
    """A cosine is then the mean of both."""
    embed(config(workspace), tmp_path / "text", progress=False)
    with_crm = config(workspace, crm=str(workspace.crm))
    embed(with_crm, tmp_path / "both", progress=False)
    text, both = (subr.load_embeddings(tmp_path / name) for name in ("text", "both"))
    items = load_crm(workspace.crm, Dataset.load(workspace.data)).item_embeddings
    items = torch.nn.functional.normalize(items - items.mean(0))
    torch.testing.assert_close(both @ both.T, (text @ text.T + items @ items.T) / 2)
    with pytest.raises(InputError, match="crm"):
        embed(config(workspace, crm=str(tmp_path / "none")), tmp_path / "other", progress=False)


def test_blocks_give_what_all_texts_at_once_give(
    workspace: Workspace, tmp_path: Path, embedded: list[list[str]]
) -> None:
    embed(config(workspace), tmp_path / "embeddings", progress=False)
    data = Dataset.load(workspace.data)
    model, tokenizer = load_encoder(workspace.model), load_tokenizer(workspace.model)
    assert len(embedded) == BLOCKS
    lengths = [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for block in embedded for text in block
    ]
    assert lengths == sorted(lengths, reverse=True)
    expected = subr.pca(subr.embed_items(data.texts, model, tokenizer, progress=False), DIM)
    found = subr.load_embeddings(tmp_path / "embeddings", data.items["item_id"].to_pylist())
    tolerance = 0.05 if model.dtype == torch.bfloat16 else 1e-4  # batches differ, and with them the rounding
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(ITEMS))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_file_says_what_it_is_of(workspace: Workspace, tmp_path: Path) -> None:
    embed(config(workspace), tmp_path / "embeddings", progress=False)
    assert subr.load_item_ids(tmp_path / "embeddings") == [str(i + 1) for i in range(ITEMS)]
    with safe_open(tmp_path / "embeddings" / "embeddings.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == "model"
    assert all(len(metadata[f"{name}_sha256"]) == 64 for name in ("item_ids", "items", "weights"))


@pytest.mark.parametrize(
    "stop",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
    ids=["ctrl-c", "full disk"],
)
def test_what_is_stopped_goes_on_with_the_next_block(
    workspace: Workspace,
    tmp_path: Path,
    embedded: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
) -> None:
    embed(config(workspace), tmp_path / "whole", progress=False)
    embed(config(workspace, dim=3), tmp_path / "embeddings", progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "embeddings").iterdir()}
    embedded.clear()
    original = embedding.save_file

    def stopping(*arguments: Any) -> None:
        if len(embedded) == 3:
            raise stop
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "save_file", stopping)
        with pytest.raises(type(stop)):
            embed(config(workspace), tmp_path / "embeddings", redo=True, progress=False)
    assert {path: path.read_bytes() for path in (tmp_path / "embeddings").iterdir()} == before
    embed(config(workspace), tmp_path / "embeddings", redo=True, progress=False)
    assert len(embedded) == BLOCKS + 1  # the one that was stopped is run again
    assert embedded[2] == embedded[3]
    one, two = (subr.load_embeddings(tmp_path / name) for name in ("whole", "embeddings"))
    assert one.equal(two)


def test_one_process_at_a_time_works_in_a_folder(workspace: Workspace, tmp_path: Path) -> None:
    with (
        runs.locked(tmp_path / "embeddings"),
        pytest.raises(InputError, match="embeddings: expected no other process at work there, found one"),
    ):
        embed(config(workspace), tmp_path / "embeddings", progress=False)
    assert not list(tmp_path.iterdir())


def test_states_are_never_held_together(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def loading(path: Path, **more: Any) -> dict[str, torch.Tensor]:
        assert sum(states() is not None for states in held) <= 1  # the one before, until the loop goes on
        block = original(path, **more)
        held.append(weakref.ref(block["states"]))
        return block

    original = embedding.load_file
    monkeypatch.setattr(embedding, "load_file", loading)
    embed(config(workspace), tmp_path / "embeddings", progress=False)
    assert len(held) == 2 * BLOCKS


def test_finished_work_is_repeated_for_other_texts_or_weights_alone(
    workspace: Workspace, tmp_path: Path, embedded: list[list[str]]
) -> None:
    for name in ("data", "model"):
        (tmp_path / name).mkdir()
        for path in (workspace.root / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    own = Workspace(tmp_path)
    for _ in range(2):
        embed(config(own), own.embeddings, progress=False)
        assert len(embedded) == BLOCKS

    items = pq.read_table(own.data / "items.parquet")
    texts = [*items["text"].to_pylist()[:-1], "Film 40 (2026). War"]
    column = items.column_names.index("text")
    pq.write_table(items.set_column(column, "text", pa.array(texts)), own.data / "items.parquet")
    embed(config(own), own.embeddings, progress=False)
    assert len(embedded) == 2 * BLOCKS
    make_model(own.model, Dataset.load(own.data), hidden_size=24)
    embed(config(own), own.embeddings, progress=False)
    assert len(embedded) == 3 * BLOCKS
    with pytest.raises(InputError, match=f"holds a run with dim = {DIM}, expected 2"):
        embed(config(own, dim=2), own.embeddings, progress=False)


def test_a_text_that_cannot_be_embedded_is_named_by_its_item(workspace: Workspace, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in workspace.data.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    items = pq.read_table(data / "items.parquet")
    texts, ids = items["text"].to_pylist(), items["item_id"].to_pylist()
    texts[23] = ""
    column = items.column_names.index("text")
    pq.write_table(items.set_column(column, "text", pa.array(texts)), data / "items.parquet")
    with pytest.raises(InputError, match=f"expected at least one token each, got none for item '{ids[23]}'"):
        embed(config(workspace, data=str(data)), tmp_path / "embeddings", progress=False)
    assert not (tmp_path / "embeddings").exists()
