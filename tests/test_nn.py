"""The modules by themselves, against loops in plain Python."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from rellax.errors import InputError
from rellax.nn import AnswerHead, CFLoRALinear, GateBank, SoftPrompt
from rellax.nn.answer import find_answers
from rellax.testing.cases import device

F64 = torch.float64


# ---- CFLoRALinear


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cflora_linear(packed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = CFLoRALinear(9, 7, r=3, alpha=6, bias=bias, dtype=F64)
    layer.lora_b.data.normal_()
    gate = torch.randn(3, 3, 3, dtype=F64)
    rows = [torch.randn(n, 9, dtype=F64) for n in ((2, 5, 1) if packed else (4, 4, 4))]
    expected = []
    for g, x in zip(gate, rows, strict=True):
        weight = layer.weight + 2.0 * layer.lora_b @ g.t() @ layer.lora_a
        expected.append(F.linear(x, weight, layer.bias))
    if packed:
        y = layer(torch.cat(rows), gate, cu_seqlens=torch.tensor([0, 2, 7, 8], dtype=torch.int32))
        assert_close(y, torch.cat(expected))
    else:
        assert_close(layer(torch.stack(rows), gate), torch.stack(expected))


def test_cflora_linear_starts_as_the_linear_layer_and_trains_lora_alone() -> None:
    layer = CFLoRALinear(5, 4, r=2, dropout=0.5, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    trainable = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_a": torch.float32, "lora_b": torch.float32}
    assert layer.lora_a.std() > 0.1
    assert "r=2, scale=8, dropout=0.5" in repr(layer)
    assert "r=8, scale=2, dropout=0" in repr(CFLoRALinear(5, 4))


def test_cflora_linear_starts_a_as_linear_layers_start() -> None:
    a, bound = CFLoRALinear(100, 4, r=16).lora_a, 1 / math.sqrt(100)
    assert 0.95 * bound < a.abs().max() <= bound


def test_cflora_linear_drops_in_training_only() -> None:
    torch.manual_seed(0)
    layer = CFLoRALinear(64, 8, r=2, dropout=0.5, dtype=F64)
    layer.lora_b.data.normal_()
    x = torch.randn(1, 5, 64, dtype=F64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert_close(layer(x), F.linear(x, layer.weight + 8 * layer.lora_b @ layer.lora_a, layer.bias))


COUNT = r"expected a whole number, at least 1 and less than 2\^31, got"
TABLE = r"item_embeddings: expected a floating tensor of shape \(N, E\), got"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFLoRALinear(4, 4, r=0), f"r: {COUNT} 0"),
        (lambda: CFLoRALinear(4, 4, 2.5), f"r: {COUNT} 2.5"),
        (lambda: CFLoRALinear(-1, 4), "in_features: expected a whole number, at least 0 .*, got -1"),
        (lambda: CFLoRALinear(4, None), "out_features: expected a whole number, at least 0 .*, got None"),
        (lambda: CFLoRALinear(4, 4, alpha=math.nan), "alpha: expected a positive number, got nan"),
        (lambda: CFLoRALinear(4, 4, alpha=np.float32(0)), "alpha: expected a positive number"),
        (lambda: CFLoRALinear(4, 4, dropout=1.0), r"dropout: expected a probability in \[0, 1\), got 1.0"),
        (lambda: CFLoRALinear(4, 4, dropout=-0.1), "dropout: expected a probability"),
        (lambda: CFLoRALinear(4, 4, dropout=None), "dropout: expected a probability"),
        (lambda: GateBank(-1, 2, 8), f"num_projections: {COUNT} -1"),
        (lambda: GateBank(1, 2.0, 8), f"rank: {COUNT} 2.0"),
        (lambda: GateBank(1, 2, True), f"cond_dim: {COUNT} True"),
        (
            lambda: GateBank(1, 2, 8)(None),
            r"instance_embed: expected shape \(B, cond_dim = 8\) on .*, got None",
        ),
        (
            lambda: GateBank(1, 2, 8)(torch.ones(3, 8, device="meta")),
            r"instance_embed: expected shape \(B, cond_dim = 8\) on .*, got \(3, 8\), float32, on meta",
        ),
        (lambda: SoftPrompt(torch.ones(3), 4, (5,)), rf"{TABLE} \(3,\), float32"),
        (lambda: SoftPrompt(torch.ones(3, 4).int(), 4, (5,)), rf"{TABLE} \(3, 4\), int32"),
        (lambda: SoftPrompt([[1.0]], 4, (5,)), f"{TABLE} list"),
        (lambda: SoftPrompt(torch.ones(3, 4), 0, (5,)), f"hidden_size: {COUNT} 0"),
        (
            lambda: SoftPrompt(torch.ones(3, 4), 4, ()),
            r"placeholder_ids: expected distinct token ids, got \(\)",
        ),
        (
            lambda: SoftPrompt(torch.ones(3, 4), 4, (5, 5)),
            r"placeholder_ids: expected distinct token ids, got \(5, 5\)",
        ),
        (lambda: AnswerHead((4, 4)), r"answer_ids: expected two different token ids .*, got \(4, 4\)"),
        (lambda: AnswerHead((4, -1)), r"answer_ids: expected two different token ids .*, got \(4, -1\)"),
        (lambda: AnswerHead((4, 2**31)), "answer_ids: expected two different token ids .*, got"),
        (lambda: AnswerHead(4), "answer_ids: expected two different token ids .*, got 4"),
        (lambda: AnswerHead(None, softcap=0), "softcap: expected a positive number, got 0"),
    ],
)
def test_modules_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make()


def test_modules_take_numbers_of_numpy() -> None:
    two, half = np.int64(2), np.float32(0.5)
    layer = CFLoRALinear(two, two, two, alpha=np.float32(16), dropout=half)
    assert (type(layer.scale), layer.scale, type(layer.dropout), layer.dropout) == (float, 8.0, float, 0.5)
    assert GateBank(two, np.uint8(16), two)(torch.ones(1, 2)).shape == (2, 1, 16, 16)
    assert SoftPrompt(torch.ones(3, 4), two, (np.int32(5), two)).placeholder_ids.tolist() == [5, 2]
    assert AnswerHead((np.int64(4), two), softcap=half).answer_ids == (4, 2)


def test_modules_are_made_on_the_device() -> None:
    made = CFLoRALinear(4, 3, device="meta"), GateBank(2, 3, 4, device="meta")
    soft = SoftPrompt(torch.ones(3, 4), 5, (7, 9), device="meta")
    for module in (*made, soft):
        assert {x.device.type for x in (*module.parameters(), *module.buffers())} == {"meta"}


# ---- GateBank


@pytest.mark.parametrize("interaction", ["full", "diagonal"])
def test_gate_bank_is_one_small_network_per_projection(interaction: str) -> None:
    torch.manual_seed(0)
    bank = GateBank(4, 3, 5, interaction, "kaiming", dtype=F64)
    for parameter in bank.parameters():
        parameter.data.normal_()
    u = torch.randn(7, 5, dtype=F64)
    gates = bank(u)
    assert gates.shape == (4, 7, 3, 3)
    for m, b in itertools.product(range(4), range(7)):
        x = (u[b] - u[b].mean()) / (u[b].var(unbiased=False) + 1e-5).sqrt() * bank.ln_weight[
            m
        ] + bank.ln_bias[m]
        h = bank.w1[m] @ x + bank.b1[m]
        out = bank.w2[m] @ (h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))) + bank.b2[m]
        assert_close(gates[m, b], torch.diag(out) if interaction == "diagonal" else out.view(3, 3))


@pytest.mark.parametrize("interaction", ["full", "diagonal"])
def test_gate_bank_starts_as_exactly_the_identity(interaction: str) -> None:
    bank = GateBank(3, 4, 6, interaction)
    gates = bank(torch.randn(5, 6) * 100)
    assert torch.equal(gates, torch.eye(4).expand(3, 5, 4, 4))


def test_gate_bank_starts_as_published() -> None:
    torch.manual_seed(0)
    bank = GateBank(3, 4, 6, gate_init="kaiming")
    assert bank.w2.shape == (3, 16, 32)  # of full matrices
    for parameter in bank.parameters():
        parameter.data.fill_(7.0)
    bank.reset_parameters()
    assert (bank.ln_weight == 1).all()
    assert not bank.ln_bias.any()
    for weight, fan_in in ((bank.w1, 6), (bank.w2, 32)):
        bound = math.sqrt(6 / fan_in)  # Kaiming uniform of one matrix
        assert weight.abs().max() <= bound
        assert (weight.abs().amax((1, 2)) > 0.8 * bound).all()
    assert not bank.b1.any()
    assert not bank.b2.any()


def test_gate_bank_computes_in_its_own_dtype() -> None:
    u = torch.randn(2, 3, dtype=F64, requires_grad=True)
    gates = GateBank(1, 2, 3, gate_init="kaiming")(u)
    assert gates.dtype == torch.float32
    (du,) = torch.autograd.grad(gates.square().sum(), u)
    assert du.dtype == F64
    assert du.any()


def test_gate_bank_refuses() -> None:
    with pytest.raises(InputError, match="interaction: expected one of"):
        GateBank(1, 2, 3, "none")
    with pytest.raises(InputError, match="gate_init: expected one of"):
        GateBank(1, 2, 3, gate_init="zero")
    for shape in ((3,), (2, 4), (1, 2, 3)):
        with pytest.raises(InputError, match=r"instance_embed: expected shape \(B, cond_dim = 3\)"):
            GateBank(1, 2, 3)(torch.zeros(shape))


# ---- SoftPrompt


def soft_prompt(items: int = 6) -> tuple[SoftPrompt, Tensor]:
    torch.manual_seed(0)
    return SoftPrompt(torch.randn(items, 4, dtype=F64), 5, (8, 99), dtype=F64), torch.randn(9, 5, dtype=F64)


def by_hand(module: SoftPrompt, ids: Tensor, items: Tensor, words: Tensor, scale: float = 1.0) -> Tensor:
    first, _, second = module.projector
    rows = []
    for row, row_items in zip(ids.tolist(), items.tolist(), strict=True):
        left = list(row_items)
        for token in row:
            if token in (8, 99):
                rows.append(second(F.gelu(first(module.item_embeddings[left.pop(0)]))))
            else:
                rows.append(words[token] * scale)
    return torch.stack(rows).view(*ids.shape, -1)


IDS = torch.tensor([[8, 1, 2, 99, 3], [4, 8, 8, 5, 8], [1, 2, 3, 4, 5]])
ITEM_IDS = torch.tensor([[5, 0, -1], [0, 0, 3], [-1, -1, -1]])


@pytest.mark.parametrize("scale", [None, 7.5])
def test_soft_prompt_writes_word_rows_and_soft_rows(scale: float | None) -> None:
    module, words = soft_prompt()
    expected = by_hand(module, IDS, ITEM_IDS, words, scale or 1.0)
    embeds = module(IDS, ITEM_IDS, words, None if scale is None else torch.tensor(scale))
    assert_close(embeds, expected)
    weight = torch.randn_like(expected)
    parameters = list(module.projector.parameters())
    assert_close(
        torch.autograd.grad((embeds * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
    )
    is_word = ~module.is_placeholder(IDS)
    assert torch.equal(embeds[is_word], words[IDS[is_word]] * (scale or 1.0))


def test_soft_prompt_keeps_a_table_of_its_own() -> None:
    table = torch.randn(6, 4, requires_grad=True)
    kept = SoftPrompt(table, 5, (8, 99)).item_embeddings
    assert not kept.requires_grad
    kept.zero_()
    assert table.all()
    assert SoftPrompt(table, 5, (8, 99), dtype=F64).item_embeddings.dtype == F64


def test_soft_prompt_takes_ids_of_any_integer_dtype() -> None:
    module, words = soft_prompt()
    assert torch.equal(module(IDS, ITEM_IDS.int(), words), module(IDS, ITEM_IDS, words))


def test_soft_prompt_projects_each_item_once() -> None:
    module, words = soft_prompt()
    seen = []
    module.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    items = torch.tensor([[5, 2, -1], [2, 2, 3], [-1, -1, -1]])
    module(IDS, items, words)
    assert torch.equal(seen[0], module.item_embeddings[[2, 3, 5]])


def test_soft_prompt_follows_a_resized_table_and_trains_it() -> None:
    module, words = soft_prompt()
    words = torch.cat([words, torch.randn(91, 5, dtype=F64)]).requires_grad_()  # 99 has become a word
    embeds = module(IDS, ITEM_IDS, words, torch.tensor(7.5))
    expected = by_hand(module, IDS, ITEM_IDS, words, 7.5)
    assert_close(embeds, expected)
    weight = torch.randn_like(expected)
    leaves = [words, *module.projector.parameters()]
    assert_close(
        torch.autograd.grad((embeds * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )


def test_soft_prompt_without_any_placeholder() -> None:
    module, words = soft_prompt()
    ids = torch.tensor([[1, 2], [3, 4]])
    for items in (torch.empty(2, 0, dtype=torch.int64), torch.full((2, 3), -1)):
        assert torch.equal(module(ids, items, words), words[ids])


def test_soft_prompt_keeps_the_dtype_of_the_words() -> None:
    module, words = soft_prompt()
    assert module(IDS, ITEM_IDS, words.to(torch.bfloat16)).dtype == torch.bfloat16
    module.projector.float()  # beside a table in fp64
    assert module(IDS, ITEM_IDS, words).dtype == F64


@pytest.mark.parametrize("items", [6, 60], ids=["fewer-than-ids", "more-than-ids"])
def test_soft_prompt_compiles_to_one_graph(items: int) -> None:
    """How many items are distinct is then as unknown as on a GPU."""
    module, words = soft_prompt(items)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    embeds, expected = compiled(IDS, ITEM_IDS, words), by_hand(module, IDS, ITEM_IDS, words)
    assert_close(embeds, expected)
    weight = torch.randn_like(expected)
    parameters = list(module.projector.parameters())
    assert_close(
        torch.autograd.grad((embeds * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
    )


@pytest.mark.parametrize("items", [6, 60])
@pytest.mark.parametrize("wrong", [-1, -7, 60, 2**40])
def test_soft_prompt_compiled_on_a_gpu_gives_nan_for_what_is_no_item(
    items: int, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "triton")
    module, words = (made.to(device(), torch.float32) for made in soft_prompt(items))
    ids, item_ids = IDS.to(device()), ITEM_IDS.to(device(), copy=True)
    item_ids[1, 2] = wrong
    with torch.no_grad():
        embeds = torch.compile(module, backend="aot_eager", fullgraph=True)(ids, item_ids, words)
    lacks = torch.zeros_like(ids, dtype=torch.bool)
    lacks[1, 4] = True
    assert torch.equal(embeds.isnan().all(-1), lacks)
    item_ids[1, 2] = 0
    assert_close(embeds[~lacks], by_hand(module, ids, item_ids, words)[~lacks])


@pytest.mark.parametrize("given", [2, 1])
@pytest.mark.parametrize("items", [6, 60])
def test_soft_prompt_compiled_on_a_gpu_gives_nan_for_a_placeholder_beyond_the_items(
    items: int, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("RELLAX_BACKEND", "triton")
    module, words = (made.to(device(), torch.float32) for made in soft_prompt(items))
    ids, item_ids = IDS.to(device()), ITEM_IDS.to(device())
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        embeds = compiled(ids, item_ids[:, :given], words)
    placeholder = module.is_placeholder(ids)
    lacks = placeholder & (placeholder.cumsum(1) > given)
    assert torch.equal(embeds.isnan().all(-1), lacks)
    assert_close(embeds[~lacks], by_hand(module, ids, item_ids, words)[~lacks])


def test_soft_prompt_says_what_was_wrong_when_the_values_have_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU a stand-in for the way from a GPU, which takes a call."""
    monkeypatch.setenv("RELLAX_BACKEND", "triton")
    module, words = (made.to(device(), torch.float32) for made in soft_prompt())
    ids, right = IDS.to(device()), ITEM_IDS.to(device())
    wrong = right.clone()
    wrong[1, 2] = -1
    if device().type == "cpu":
        underway: list[Tensor] = []

        def exchange(values: Tensor) -> list[Tensor]:
            arrived = underway.copy()
            underway[:] = [values]
            return arrived

        monkeypatch.setattr(module._arrivals, "exchange", exchange)
    assert module(ids, wrong, words)[1, 4].isnan().all()
    if device().type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(InputError, match=r"expected 3 ids in row 1, .*, got 2, in an earlier batch"):
        module(ids, right, words)


def _step(module: SoftPrompt) -> None:
    with torch.no_grad():
        module.projector[0].weight.add_(1.0)


def _load(module: SoftPrompt, assign: bool) -> None:
    """Other weights, which tensor versions do not tell from the old ones."""
    state = {name: tensor * 2 for name, tensor in module.state_dict().items()}
    for name, tensor in module.state_dict().items():
        while state[name]._version < tensor._version:
            state[name].add_(0)
    module.load_state_dict(state, assign=assign)


def projections(module: SoftPrompt) -> list[int]:
    """Gets an entry each time that the module projects items."""
    projected: list[int] = []
    module.projector.register_forward_hook(lambda *_: projected.append(1))
    return projected


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.item_embeddings.mul_(2),
        _step,
        lambda module: _load(module, assign=False),
        lambda module: _load(module, assign=True),
        lambda module: module.train().eval(),
        lambda module: module.float().double(),
        torch.inference_mode()(lambda module: module.float().double()),
    ],
    ids=["items", "step", "load", "assign", "train", "cast", "cast-in-inference-mode"],
)
def test_soft_prompt_drops_a_stale_table(change: Any) -> None:
    module, words = soft_prompt()
    module.eval()
    module.cache_table()
    projected = projections(module)
    with torch.no_grad():
        embeds = module(IDS, ITEM_IDS, words)
        assert not projected  # the table served
        assert_close(embeds, by_hand(module, IDS, ITEM_IDS, words))
        change(module)
        projected.clear()
        embeds = module(IDS, ITEM_IDS, words)
        assert projected
        assert_close(embeds, by_hand(module, IDS, ITEM_IDS, words))


@pytest.mark.parametrize("inside", [False, True])
def test_soft_prompt_has_a_table_after_a_move_in_inference_mode(inside: bool) -> None:
    """And the table is dropped when a weight changes there."""
    module, words = soft_prompt()
    module.eval()
    with torch.inference_mode():
        module.float().double()
    with torch.inference_mode(inside):
        module.cache_table()
    projected = projections(module)
    with torch.inference_mode():
        embeds = module(IDS, ITEM_IDS, words)
        assert not projected  # the table served
        assert_close(embeds, by_hand(module, IDS, ITEM_IDS, words))
        _step(module)
        assert_close(module(IDS, ITEM_IDS, words), by_hand(module, IDS, ITEM_IDS, words))


def test_soft_prompt_makes_its_table_once() -> None:
    module, words = soft_prompt()
    module.eval()
    module.cache_table()
    projected = projections(module)
    module.eval()
    module.cache_table()
    with torch.no_grad():
        module(IDS, ITEM_IDS, words)
    assert not projected


def test_soft_prompt_compiled_makes_no_use_of_a_table() -> None:
    torch._dynamo.reset()
    module, words = soft_prompt()
    module.eval()
    module.cache_table()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert_close(compiled(IDS, ITEM_IDS, words), by_hand(module, IDS, ITEM_IDS, words))
            _step(module)


def test_soft_prompt_has_gradients_beside_a_table() -> None:
    module, words = soft_prompt()
    module.eval()
    module.cache_table()
    assert module(IDS, ITEM_IDS, words).requires_grad
    twin = copy.deepcopy(module)
    with torch.no_grad():
        _step(twin)
        assert_close(twin(IDS, ITEM_IDS, words), by_hand(twin, IDS, ITEM_IDS, words))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([[5, -1, -1], [0, 0, 3], [-1, -1, -1]], "expected 2 ids in row 0, .*, got 1"),
        ([[5, 0, -1], [0, 0, 3], [-1, -1, 2]], "expected 0 ids in row 2, .*, got 1"),
        ([[5, -1, 0], [0, 0, 3], [-1, -1, -1]], "expected -1 at the end of a row only"),
        ([[5, 6, -1], [0, 0, 3], [-1, -1, -1]], r"expected ids in \[0, 6\), padded with -1, got 6"),
        ([[5, 0, -2], [0, 0, 3], [-1, -1, -1]], "padded with -1, got -2"),
        ([[5, 0, -1], [0, 0, 3]], r"expected integers of shape \(B = 3, K\)"),
        ([[5.0, 0, -1], [0, 0, 3], [-1, -1, -1]], "expected integers"),
    ],
)
def test_soft_prompt_refuses(items: Any, message: str) -> None:
    module, words = soft_prompt()
    with pytest.raises(InputError, match=message):
        module(IDS, torch.tensor(items), words)


# ---- AnswerHead


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 6, 2, 3], [4]])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_answers_are_found_within_their_instance(lengths: list[int], density: float) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    tokens = torch.randint(0, 50, (sum(lengths),), generator=generator)
    labels = tokens.where(torch.rand(len(tokens), generator=generator) < density, -100)
    ends = list(itertools.accumulate(lengths, initial=0))
    expected = [[t for t in range(a + 1, b) if labels[t] != -100] for a, b in itertools.pairwise(ends)]
    layouts = [(labels[None], torch.tensor(ends, dtype=torch.int32))]
    if len(set(lengths)) == 1:
        layouts.append((labels.view(len(lengths), -1), None))
    for shaped, cu_seqlens in layouts:
        every = find_answers(shaped, cu_seqlens, first_only=False)
        assert every.positions.tolist() == [t - 1 for row in expected for t in row]
        assert every.labels.tolist() == [int(labels[t]) for row in expected for t in row]
        assert [
            every.positions.tolist()[i] + 1 for i in every.first.tolist() if i < len(every.positions)
        ] == [row[0] for row in expected if row]
        first = find_answers(shaped, cu_seqlens, first_only=True)
        for b, row in enumerate(expected):
            if row:
                assert (int(first.positions[b]), int(first.labels[b])) == (row[0] - 1, int(labels[row[0]]))
            else:
                assert int(first.labels[b]) == -100
                assert int(first.first[b]) == len(expected)


@pytest.mark.parametrize("loss", ["choice", "vocab"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_answer_head(loss: str, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 8, dtype=F64, requires_grad=True)
    weight, bias = torch.randn(20, 8, dtype=F64), torch.randn(20, dtype=F64)
    labels = torch.full((4, 6), -100)
    labels[0, 3], labels[1, 5], labels[2, 1], labels[2, 4] = 11, 4, 4, 11  # the last instance has no label
    head = AnswerHead((4, 11), loss, softcap)
    got, logits = head(hidden, labels, weight, bias)
    full = hidden @ weight.t() + bias
    full = full if softcap is None else softcap * torch.tanh(full / softcap)
    rows = full[[0, 1, 2, 2], [2, 4, 0, 3]]
    if loss == "choice":
        expected = F.cross_entropy(rows[:3, [4, 11]], torch.tensor([1, 0, 0]))
    else:
        expected = F.cross_entropy(rows, torch.tensor([11, 4, 4, 11]))
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(expected, hidden))
    assert_close(logits[:3], rows[:3, [4, 11]].detach())
    assert_close(head.logits(hidden, torch.tensor([2, 10, 12]), weight, bias), logits[:3])
    assert logits[3].isnan().all()
    assert not logits.requires_grad


@pytest.mark.parametrize("base_logit", [None, torch.zeros(2)], ids=["plain", "base_logit"])
def test_a_label_that_nothing_predicts_has_no_share_of_the_denominator(base_logit: Tensor | None) -> None:
    hidden, weight = torch.randn(2, 4, 8), torch.randn(20, 8)
    labels = torch.tensor([[4, -100, 11, 4], [-100, 4, 11, -100]])  # two answers, of four labels predicted
    head = AnswerHead((4, 11))
    mean, _ = head(hidden, labels, weight, base_logit=base_logit)
    loss, _ = head(hidden, labels, weight, denominator=12, base_logit=base_logit)
    assert_close(loss, mean * 4 / 12)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (3,)])
def test_answer_head_takes_one_base_logit_an_instance(shape: tuple[int, ...]) -> None:
    hidden, labels = torch.randn(2, 4, 8), torch.full((2, 4), 11)
    with pytest.raises(InputError, match=r"^base_logit: expected \(B,\) = \(2\), floating"):
        AnswerHead((4, 11))(hidden, labels, torch.randn(20, 8), base_logit=torch.zeros(shape))


def test_answers_that_begin_from_a_base_are_computed_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((2, 4, 64), (20, 64), (20,)))
    labels = torch.full((2, 4), -100)
    labels[0, 2], labels[1, 3] = 11, 4
    base = torch.tensor([0.5, -2.0])
    loss, logits = AnswerHead((4, 11), softcap=9.0)(hidden, labels, weight, bias, base_logit=base)
    rows = hidden.double()[[0, 1], [1, 2]]
    exact = 9 * torch.tanh((rows @ weight.double()[[4, 11]].t() + bias.double()[[4, 11]]) / 9)
    exact[:, 1] += base.double()
    assert loss.dtype == logits.dtype == torch.float32
    assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert_close(loss.double(), F.cross_entropy(exact, torch.tensor([1, 0])), rtol=1e-5, atol=1e-5)
    wide, _ = AnswerHead((4, 11))(hidden, labels, weight.double(), base_logit=base)
    assert wide.dtype == F64


@pytest.mark.parametrize("base_logit", [None, torch.zeros(2)], ids=["plain", "base_logit"])
def test_an_answer_that_cannot_be_one(base_logit: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values cannot be read, as on a GPU, it makes the loss NaN."""
    hidden, weight, labels = torch.randn(2, 4, 8), torch.randn(20, 8), torch.full((2, 4), -100)
    labels[0, 2], labels[1, 3] = 7, 11
    with pytest.raises(InputError, match=r"choice_ids: expected two different tokens .* in \[0, 20\)"):
        AnswerHead((4, 20))(hidden, labels, weight, base_logit=base_logit)
    head = AnswerHead((4, 11))
    with pytest.raises(InputError, match=r"labels: expected choice_ids \(4, 11\) or -100, got 7"):
        head(hidden, labels, weight, base_logit=base_logit)
    if base_logit is not None:
        monkeypatch.setattr(sys.modules[AnswerHead.__module__], "can_read", lambda _: False)
        loss, logits = head(hidden, labels, weight, base_logit=base_logit)
        assert loss.isnan()
        assert logits.isfinite().all()


@pytest.mark.parametrize("denominator", [None, 7.0])
@pytest.mark.parametrize(
    ("loss", "base_logit"), [("choice", None), ("choice", torch.zeros(2)), ("vocab", None)]
)
def test_answer_head_without_any_label(
    loss: str, base_logit: Tensor | None, denominator: float | None
) -> None:
    hidden, labels, weight = torch.randn(2, 3, 8), torch.full((2, 3), -100), torch.randn(20, 8)
    options = {"denominator": denominator, "base_logit": base_logit}
    got, logits = AnswerHead((4, 11), loss)(hidden, labels, weight, **options)
    assert got == 0
    assert logits.shape == (2, 2)
    assert logits.isnan().all()


@pytest.mark.parametrize(
    "labels",
    [torch.ones(2, 3).long(), torch.ones(2, 0).long(), torch.ones(2, 4, device="meta").long()],
    ids=["length", "empty", "device"],
)
def test_answer_head_refuses(labels: Tensor) -> None:
    hidden = torch.randn(2, 0 if labels.numel() == 0 else 4, 8)
    with pytest.raises(InputError, match=r"^labels: expected shape \(2, .\), L at least 1, on cpu, got"):
        AnswerHead((4, 11))(hidden, labels, torch.randn(20, 8))


def test_answer_head_without_answer_ids() -> None:
    hidden, labels, weight = torch.randn(2, 3, 8), torch.full((2, 3), 5), torch.randn(20, 8)
    loss, logits = AnswerHead(None, "vocab")(hidden, labels, weight)
    assert loss > 0
    assert logits is None
    for head in (AnswerHead(None, "choice"), AnswerHead(None, "vocab")):
        with pytest.raises(InputError, match=r"answer_ids: expected the token ids \(no_id, yes_id\)"):
            head.logits(hidden, torch.tensor([0]), weight)
    with pytest.raises(InputError, match="answer_ids"):
        AnswerHead(None, "choice")(hidden, labels, weight)
    with pytest.raises(InputError, match="loss: expected one of"):
        AnswerHead(None, "mse")
