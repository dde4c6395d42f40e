"""SUBR: embeddings of item texts, principal components, retrieval, and their files."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.decomposition
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rellax.errors import InputError
from rellax.subr import (
    PCA,
    embed_items,
    load_embeddings,
    pca,
    read_retrieved,
    retrieve,
    save_embeddings,
    write_retrieved,
)

WORDS = ["the", "of", "alien", "quiet", "river", "war", "love", "star", "king", "night", "city", "last"]
TEXTS = [" ".join(WORDS[: 1 + (5 * i) % 11]) + f" {WORDS[i % 12]}" for i in range(23)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that adds <s>, and pads on the left, unless told otherwise."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", padding_side="left"
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_an_embedding_is_the_mean_over_the_own_tokens_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    embeddings = embed_items(TEXTS, model, tokenizer, progress=False)
    ids = tokenizer.get_vocab()
    assert embeddings.shape == (23, 24)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        own = torch.tensor([[ids[word] for word in text.split()]])
        with torch.no_grad():
            hidden = model(own, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(embedding, hidden[0].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 13, 60, 10_000])
def test_neither_padding_nor_order_changes_an_embedding(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_tokens: int
) -> None:
    alone = torch.cat([embed_items([text], model, tokenizer, progress=False) for text in TEXTS])
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = embed_items(
        [TEXTS[i] for i in order], model, tokenizer, batch_tokens=batch_tokens, progress=False
    )
    torch.testing.assert_close(shuffled, alone[order], rtol=1e-4, atol=1e-5)


def test_embedding_runs_without_dropout_and_leaves_the_model_in_its_mode(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = embed_items(TEXTS, model, tokenizer, progress=False)
    model.train()
    try:
        found = embed_items(TEXTS, model, tokenizer, progress=False)
        assert model.training
    finally:
        model.eval()
    assert found.equal(expected)
    assert found.dtype == torch.float32


def test_no_text_gives_no_row(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert embed_items([], model, tokenizer, progress=False).shape == (0, 24)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one token each, got none for item 1"),
        ("war " * 33, "at most 32 tokens each, got 33 for item 1"),
    ],
    ids=["empty", "too long"],
)
def test_a_text_that_cannot_be_embedded_is_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        embed_items(["war", text], model, tokenizer, progress=False)


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3, 0.1, columns)
    mixing = torch.randn(columns, columns, generator=generator)
    return (torch.randn(rows, columns, generator=generator) * scale) @ mixing + 5


@pytest.mark.parametrize(("rows", "columns", "dim"), [(200, 12, 5), (200, 12, 12), (9, 12, 20)], ids=str)
def test_components_are_those_of_scikit_learn(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, dim: int
) -> None:
    monkeypatch.setattr(inspect.getmodule(PCA), "_BLOCK_ROWS", 7)
    x = correlated(rows, columns)
    expected = sklearn.decomposition.PCA(min(dim, rows - 1, columns)).fit(x.double().numpy())
    fitted = PCA.fit(x, dim)
    signs = np.sign((fitted.components.numpy() * expected.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(fitted.components.numpy(), signs * expected.components_, atol=1e-9)

    projected = signs.T * expected.transform(x.double().numpy())
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(pca(x, dim).numpy(), projected, atol=1e-6)


def test_the_sign_of_a_component_is_fixed() -> None:
    x = correlated(50, 8)
    components, mirrored = PCA.fit(x, 8).components, PCA.fit(-x, 8).components
    assert components.gather(1, components.abs().argmax(1, keepdim=True)).gt(0).all()
    torch.testing.assert_close(components, mirrored)


def test_a_row_at_the_mean_stays_zero() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert pca(x, 1).tolist() == [[1.0], [-1.0], [0.0]]


@pytest.mark.parametrize(
    ("x", "dim", "message"),
    [
        (torch.ones(1, 3), 1, "x: expected floating"),
        (torch.ones(3), 1, "x: expected floating"),
        (torch.ones(3, 2).int(), 1, "x: expected floating"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), 1, "x: expected finite values"),
        (torch.ones(3, 2), 0, "dim: expected at least 1, got 0"),
    ],
    ids=["one row", "one dimension", "integers", "NaN", "no component"],
)
def test_bad_rows_are_one_clear_sentence(x: torch.Tensor, dim: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pca(x, dim)


def test_a_future_behaviour_like_the_target_is_never_retrieved() -> None:
    embeddings = torch.eye(6)
    embeddings[5] = torch.tensor([0.9, 0.1, 0.2, 0.3, 0.4, 0.0])
    #        before the target     target   after it: the same item twice
    history = np.array([1, 2, 3, 4, 5, 0, 0, 0], dtype=np.int32)
    other_user = np.array([0, 0, 0], dtype=np.int32)
    items = np.concatenate([history, other_user])
    positions, scores = retrieve(
        embeddings,
        items,
        offsets=np.array([0, 8, 11]),
        user=np.array([0], dtype=np.int32),
        position=np.array([5], dtype=np.int32),
        target=np.array([0], dtype=np.int32),
        k=7,
    )
    assert positions.tolist() == [[4, 3, 2, 1, 0, -1, -1]]
    np.testing.assert_array_equal(scores, np.array([[0.9, 0, 0, 0, 0, -np.inf, -np.inf]], dtype=np.float32))

    items[6:] = 1  # whatever comes later and whatever others did: nothing changes
    again = retrieve(embeddings, items, np.array([0, 8, 11]), np.array([0]), np.array([5]), np.array([0]), 7)
    np.testing.assert_array_equal(again[0], positions)
    np.testing.assert_array_equal(again[1], scores)


def test_ratings_are_no_input_of_retrieval() -> None:
    parameters = list(inspect.signature(retrieve).parameters)
    assert parameters == ["embeddings", "behaviour_items", "offsets", "user", "position", "target", "k"]


def test_embeddings_come_back_for_the_same_items_only(tmp_path: Path) -> None:
    embeddings, ids = torch.randn(3, 4), ["10", "7", "x"]
    save_embeddings(tmp_path / "new", embeddings, ids, "tiny")
    assert load_embeddings(tmp_path / "new").equal(embeddings)
    assert load_embeddings(tmp_path / "new", ids).equal(embeddings)
    for others in (["7", "10", "x"], ["10", "7"], ["107", "", "x"]):
        with pytest.raises(InputError, match="got those of other items"):
            load_embeddings(tmp_path / "new", others)
    with pytest.raises(InputError, match="N = 2 item ids"):
        save_embeddings(tmp_path / "bad", embeddings, ["1", "2"], "tiny")
    assert not (tmp_path / "bad").exists()


def test_a_missing_or_damaged_file_of_embeddings_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"embeddings\.safetensors: .* found no such file"):
        load_embeddings(tmp_path)
    save_embeddings(tmp_path, torch.randn(3, 4), ["1", "2", "3"], "tiny")
    path = tmp_path / "embeddings.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"embeddings\.safetensors: .* damaged"):
        load_embeddings(tmp_path)


def test_retrieved_behaviours_survive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.getmodule(read_retrieved), "_ROW_GROUP", 2)
    samples = np.array([4, 5, 9, 11, 12])
    positions = np.array([[3, 0, 1], [-1, -1, -1], [7, -1, -1], [2, 1, -1], [0, 4, 2]])
    scores = np.where(positions < 0, -np.inf, 1 / (1 + np.arange(3))).astype(np.float32)
    write_retrieved(tmp_path / "retrieved.parquet", samples, positions, scores)
    found = read_retrieved(tmp_path / "retrieved.parquet")
    for ours, expected in zip(found, (samples, positions, scores), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert [array.dtype for array in found] == [np.int32, np.int32, np.float32]


def test_a_file_of_no_sample_keeps_its_width(tmp_path: Path) -> None:
    write_retrieved(tmp_path / "r.parquet", np.zeros(0), np.zeros((0, 3)), np.zeros((0, 3)))
    assert read_retrieved(tmp_path / "r.parquet").positions.shape == (0, 3)


def test_a_missing_or_damaged_file_of_behaviours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "retrieved.parquet"
    with pytest.raises(InputError, match=r"retrieved\.parquet: .* found no such file"):
        read_retrieved(path)
    write_retrieved(path, np.arange(3), np.zeros((3, 2)), np.zeros((3, 2)))
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    for damaged in (whole[:-5], whole[: -8 - footer] + b"\xff" * footer + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"retrieved\.parquet: .* damaged"):
            read_retrieved(path)


def test_another_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sample": [1, 2]}), tmp_path / "samples.parquet")
    with pytest.raises(InputError, match=r"samples\.parquet: expected the columns .* got \['sample'\]"):
        read_retrieved(tmp_path / "samples.parquet")
