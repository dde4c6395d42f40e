"""SUBR: embeddings of item texts, principal components, retrieval, and their files."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.decomposition
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from rellax.errors import InputError
from rellax.subr import (
    PCA,
    Retrieved,
    check_embeddings,
    check_lengths,
    embed_items,
    history_keys,
    load_embeddings,
    load_item_ids,
    pca,
    read_retrieved,
    retrieve,
    retrieved_schema,
    retrieved_table,
    save_embeddings,
    token_lengths,
    user_keys,
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


def test_a_mean_over_many_tokens_of_bfloat16_is_one_of_fp32(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    half = copy.deepcopy(model).bfloat16()
    (embedding,) = embed_items([" ".join(WORDS * 2)], half, tokenizer, progress=False)
    ids = tokenizer(" ".join(WORDS * 2), add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = half(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(embedding, hidden[0].float().mean(0), rtol=1e-5, atol=1e-6)


def test_lengths_are_counted_some_texts_at_a_time(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect.getmodule(token_lengths), "_TEXTS", 5)
    assert token_lengths(TEXTS, tokenizer).tolist() == [len(text.split()) for text in TEXTS]


def test_a_text_of_as_many_tokens_as_the_model_has_positions_for() -> None:
    check_lengths(np.array([1, 32]), SimpleNamespace(max_position_embeddings=32))
    check_lengths(np.array([1, 33]), SimpleNamespace())
    with pytest.raises(InputError, match=r"at most 32 tokens each, got 33 for item 'b'"):
        check_lengths(np.array([32, 33]), SimpleNamespace(max_position_embeddings=32), ["a", "b"])


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


@pytest.mark.parametrize(("batch_tokens", "calls"), [(1, 23), (13, 16), (60, 4), (10_000, 1)])
def test_no_more_tokens_run_at_once_than_asked_for(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_tokens: int, calls: int
) -> None:
    """Padding included, and as many as fit; one text always does."""
    shapes: list[torch.Size] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with hook:
        embed_items(TEXTS, model, tokenizer, batch_tokens=batch_tokens, progress=False)
    assert all(rows == 1 or rows * length <= batch_tokens for rows, length in shapes)
    assert len(shapes) == calls


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_the_chat_template_nor_the_tokenizer_s_padding_changes_an_embedding(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, side: str
) -> None:
    expected = embed_items(TEXTS, model, tokenizer, progress=False)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}<s> king {{ m['content'] }} war{% endfor %}"
    other.padding_side = side
    assert "king" in other.apply_chat_template([{"role": "user", "content": "star"}], tokenize=False)
    assert embed_items(TEXTS, model, other, progress=False).equal(expected)


BODY = {"vocab_size": len(WORDS) + 3, "pad_token_id": 0}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=32, **BODY)),
    "bert": lambda: BertModel(BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, **BODY)),
    "t5": lambda: T5Model(T5Config(d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, **BODY)),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_kinds_of_models_embed_as_well(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    together = embed_items(TEXTS, model, tokenizer, progress=False)
    alone = torch.cat([embed_items([text], model, tokenizer, progress=False) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (23, 24)
    assert together.std(0).min() > 0.01


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


def test_blocks_give_what_the_whole_gives_and_are_held_one_at_a_time() -> None:
    x = correlated(200, 12)
    held: list[weakref.ref[torch.Tensor]] = []

    def blocks() -> Iterator[torch.Tensor]:
        for part in x.split([1, 70, 0, 100, 29]):
            assert (
                sum(block() is not None for block in held) <= 1
            )  # the one before, which the loop still names
            part = part.clone()
            held.append(weakref.ref(part))
            yield part

    fitted, whole = PCA.fit(blocks(), 5), PCA.fit(x, 5)
    assert len(held) == 5
    torch.testing.assert_close(fitted.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fitted.components, whole.components, rtol=1e-9, atol=1e-9)


def test_a_large_common_offset_costs_no_digits() -> None:
    x = correlated(300, 6).double()
    torch.testing.assert_close(PCA.fit(x + 1e6, 6).components, PCA.fit(x, 6).components, rtol=1e-6, atol=1e-6)


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
        (torch.tensor([[1.0, torch.inf], [0.0, 1.0]]), 1, "x: expected finite values"),
        ([torch.ones(3, 2), torch.ones(3, 4)], 1, r"x: expected floating \(N, 2\), got \(3, 4\)"),
        ([], 1, "x: expected floating"),
        (torch.ones(3, 2), 0, "dim: expected at least 1, got 0"),
    ],
    ids=["one row", "one dimension", "integers", "NaN", "infinity", "two widths", "no block", "no component"],
)
def test_bad_rows_are_one_clear_sentence(
    x: torch.Tensor | list[torch.Tensor], dim: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PCA.fit(x, dim)


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
    embeddings, ids = torch.randn(3, 4), ["10", "", "Łódź"]
    save_embeddings(tmp_path / "new", embeddings, ids, "tiny")
    assert load_embeddings(tmp_path / "new").equal(embeddings)
    assert load_embeddings(tmp_path / "new", ids).equal(embeddings)
    assert load_item_ids(tmp_path / "new") == ids
    for others in (["", "10", "Łódź"], ["10", ""], ["1", "0", "Łódź"]):
        with pytest.raises(InputError, match="got those of other items"):
            load_embeddings(tmp_path / "new", others)
        with pytest.raises(InputError, match=r"got those of other items; `rellax embed` makes them anew"):
            check_embeddings(tmp_path / "new", others)
    with pytest.raises(InputError, match="N = 2 item ids"):
        save_embeddings(tmp_path / "bad", embeddings, ["1", "2"], "tiny")
    assert not (tmp_path / "bad").exists()


def test_embeddings_of_a_half_precision_model_are_kept_in_fp32(tmp_path: Path) -> None:
    table = torch.randn(3, 4).bfloat16()
    save_embeddings(tmp_path, table, ["a", "b", "c"], "model")
    found = load_embeddings(tmp_path)
    assert found.dtype == torch.float32
    assert torch.equal(found, table.float())


def test_a_file_that_kept_no_ids_is_read_all_the_same(tmp_path: Path) -> None:
    embeddings, ids = torch.randn(2, 4), ["1", "2"]
    save_embeddings(tmp_path, embeddings, ids, "tiny")
    path = tmp_path / "embeddings.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"embeddings": embeddings}, path, metadata)
    assert load_embeddings(tmp_path, ids).equal(embeddings)
    with pytest.raises(InputError, match="of an earlier version"):
        load_item_ids(tmp_path)


def test_a_missing_or_damaged_file_of_embeddings_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"embeddings\.safetensors: .* found no such file"):
        load_embeddings(tmp_path)
    save_embeddings(tmp_path, torch.randn(3, 4), ["1", "2", "3"], "tiny")
    path = tmp_path / "embeddings.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"embeddings\.safetensors: .* damaged"):
        load_embeddings(tmp_path)


def rows(k: int = 3, *, scores: bool = True) -> Retrieved:
    positions = np.array([[3, 0, 1], [-1, -1, -1], [7, -1, -1], [2, 1, -1], [0, 4, 2]])[:, :k]
    return Retrieved(
        np.array([4, 5, 9, 11, 12], dtype=np.int32),
        np.array([0, 1, 5, 2**63, 2**64 - 1], dtype=np.uint64),
        np.arange(5, dtype=np.uint64),
        positions,
        np.where(positions < 0, -np.inf, 1 / (1 + np.arange(k))).astype(np.float32) if scores else None,
    )


def write_rows(path: Path, block: Retrieved, longest: int = 8) -> Path:
    schema = retrieved_schema(block.positions.shape[1], longest, scores=block.scores is not None)
    write_retrieved(path, [retrieved_table(block, schema)], schema)
    return path


def test_retrieved_behaviours_survive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect.getmodule(read_retrieved), "_ROW_GROUP", 2)
    written = rows()
    blocks = list(read_retrieved(write_rows(tmp_path / "retrieved.parquet", written)))
    assert [len(block.sample) for block in blocks] == [2, 2, 1]
    for name, expected in written._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(block, name) for block in blocks]), expected)
    assert [array.dtype for array in blocks[0]] == [np.int32, np.uint64, np.uint64, np.int32, np.float32]


def test_scores_are_kept_on_request(tmp_path: Path) -> None:
    (block,) = read_retrieved(write_rows(tmp_path / "r.parquet", rows(scores=False)))
    assert block.scores is None
    np.testing.assert_array_equal(block.positions, rows().positions)


@pytest.mark.parametrize(("longest", "width"), [(65_536, pa.uint16()), (65_537, pa.uint32())], ids=str)
def test_positions_are_as_wide_as_the_longest_history_needs(
    tmp_path: Path, longest: int, width: pa.DataType
) -> None:
    written = rows(scores=False)
    written.positions[0, 0] = longest - 1
    path = write_rows(tmp_path / "r.parquet", written, longest)
    assert pq.read_schema(path).field("positions").type == pa.list_(width)
    assert next(read_retrieved(path)).positions[0, 0] == longest - 1


def test_a_missing_or_damaged_file_of_behaviours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "retrieved.parquet"
    with pytest.raises(InputError, match=r"retrieved\.parquet: .* found no such file"):
        next(read_retrieved(path))
    whole = write_rows(path, rows()).read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    for damaged in (whole[:-5], whole[: -8 - footer] + b"\xff" * footer + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"retrieved\.parquet: .* damaged"):
            next(read_retrieved(path))


@pytest.mark.parametrize("columns", [["sample"], ["sample", "positions", "scores"]], ids=["other", "earlier"])
def test_another_parquet_file_is_named(tmp_path: Path, columns: list[str]) -> None:
    pq.write_table(pa.table({name: [1, 2] for name in columns}), tmp_path / "samples.parquet")
    with pytest.raises(InputError, match=r"samples\.parquet: expected the columns .* got \['sample'"):
        next(read_retrieved(tmp_path / "samples.parquet"))


def test_a_history_key_stands_for_all_that_a_row_depends_on() -> None:
    items, offsets = np.array([3, 0, 7, 3, 0, 7, 9]), np.array([0, 3, 7])
    keys = user_keys(["a", "b"])
    user, position, target = np.array([0, 0, 1, 1, 0]), np.array([1, 2, 1, 2, 2]), np.array([0, 7, 0, 7, 8])
    whole = history_keys(keys, items, offsets, user, position, target)
    assert len(set(whole.tolist())) == 5  # equal histories of two users, and two targets after one history

    for changed in range(len(items)):
        other = items.copy()
        other[changed] += 1
        same = history_keys(keys, other, offsets, user, position, target) == whole
        assert same.tolist() == [
            not offsets[u] <= changed < offsets[u] + p for u, p in zip(user, position, strict=True)
        ]
    swapped = history_keys(keys, items[[1, 0, 2, 3, 4, 5, 6]], offsets, user, position, target)
    assert (swapped == whole).tolist() == [False, False, True, True, False]

    # Items whose numbers and places have the same sums.
    pairs, users = np.array([3, 1, 2, 2]), np.array([0, 1])
    one, other = history_keys(keys[[0, 0]], pairs, np.array([0, 2, 4]), users, np.array([2, 2]), users * 0)
    assert one != other

    # Other users in front, and what comes later, change nothing.
    more_items, more_offsets = np.concatenate([[5, 6], items, [1]]), np.array([0, 2, 5, 10])
    more_keys = user_keys(["0", "a", "b"])
    again = history_keys(more_keys, more_items, more_offsets, user + 1, position, target)
    np.testing.assert_array_equal(again, whole)
