"""Packed batches: attention segment by segment, and all that a patched model returns as without packing."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from test_patch import CHECKPOINTS, set_checkpointing
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.testing import assert_close
from transformers import masking_utils
from transformers.integrations import flex_attention as integration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rellax.errors import InputError
from rellax.patch import answer_logits, attention, packing_pays, unpatch_model

LENGTHS = (5, 1, 9, 4)


def heads(*counts: int, size: int = 6) -> list[Tensor]:
    """Random query, key and value of a packed batch, (1, heads, T, size) as the projections make them."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    shape = [(1, tokens, count, size) for count in counts]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for s in shape
    ]


def block_mask_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """The whole batch at once, with a mask (T, T)."""
    segment = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    position = torch.cat([torch.arange(length) for length in LENGTHS])
    back = position[:, None] - position
    mask = (segment[:, None] == segment) & (back >= 0) & (back < window)
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 2, 2)], ids=["heads", "grouped"])
def test_segments_equal_a_block_mask(counts: tuple[int, ...], window: int | None) -> None:
    inputs = heads(*counts)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "cu_seq_lens_q": ends}
    out, weights = attention.segment_sdpa(nn.Module(), *inputs, None, **options)
    expected = block_mask_attention(*inputs, 0.3, window or 1000)
    assert weights is None
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    assert_close(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


@pytest.mark.parametrize("queries", [1, 4, 192])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 2, 2)], ids=["heads", "grouped"])
def test_backward_pass_of_plain_products(
    counts: tuple[int, ...], window: int | None, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERIES", queries)
    inputs = heads(*counts)
    out = attention._Segments.apply(*inputs, LENGTHS, 0.3, window)
    expected = block_mask_attention(*inputs, 0.3, window or 1000)
    assert_close(out, expected)
    upstream = torch.randn_like(expected)
    assert_close(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


def test_backward_pass_in_bfloat16_is_at_most_twice_as_far_off_as_that_of_sdpa() -> None:
    """Scores of several units, as trained models have them; errors over many upstream gradients."""
    exact = [(2 * x.detach()).bfloat16().double().requires_grad_() for x in heads(4, 2, 2, size=64)]
    inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    ours, _ = attention.segment_sdpa(nn.Module(), *inputs, None, cu_seq_lens_q=ends)
    assert "_Segments" in type(ours.grad_fn).__name__
    sdpa = attention._each_segment(*inputs, LENGTHS, 0.0, None, None)
    assert torch.equal(ours, sdpa)
    truth = block_mask_attention(*exact, 64**-0.5, 1000)
    squares = torch.zeros(2, len(inputs), dtype=torch.float64)
    for upstream in torch.randn(32, *ours.shape).bfloat16():
        expected = torch.autograd.grad(truth, exact, upstream.double(), retain_graph=True)
        for out, row in zip((ours, sdpa), squares, strict=True):
            got = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
            row += torch.stack([(x - y).square().sum() for x, y in zip(got, expected, strict=True)])
    assert (squares[0] <= 4 * squares[1]).all()


def test_a_scale_of_the_model_s_own_in_bfloat16() -> None:
    """As Gemma 2 and 3 have, for which their heads' size is not what the scores are divided by."""
    exact = [x.detach().bfloat16().double().requires_grad_() for x in heads(4, 2, 2)]
    inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    out, _ = attention.segment_sdpa(nn.Module(), *inputs, None, scaling=1.3, cu_seq_lens_q=ends)
    expected = block_mask_attention(*exact, 1.3, 1000)
    assert_close(out.double(), expected, rtol=0, atol=0.03)
    upstream = torch.randn_like(out)
    found, known = (
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(expected, exact, upstream.double()),
    )
    for x, y in zip(found, known, strict=True):
        assert (x.double() - y).norm() < 0.02 * y.norm()


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "gpu"])
def test_weights_are_dropped_in_each_segment(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what would be faster could not."""
    if kind == "gpu":
        monkeypatch.setattr(attention, "_varlen_attn", None)
        monkeypatch.setattr(attention, "_takes_flash", lambda x: True)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float64
    inputs = [x.detach().to(dtype).requires_grad_() for x in heads(4, 2, 2)]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    torch.manual_seed(3)
    out, _ = attention.segment_sdpa(
        nn.Module(), *inputs, None, dropout=0.5, cu_seq_lens_q=ends, max_length_q=max(LENGTHS)
    )
    torch.manual_seed(3)
    options: dict[str, Any] = {"dropout_p": 0.5, "is_causal": True, "enable_gqa": True}
    segments = zip(*(x.split(LENGTHS, dim=2) for x in inputs), strict=True)
    expected = [F.scaled_dot_product_attention(*segment, **options).transpose(1, 2) for segment in segments]
    assert torch.equal(out, torch.cat(expected, 1))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("shares_keys", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_is_called_for_all_segments_at_once(
    window: int | None, shares_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU would be asked for, computed by a stand-in that takes its arguments at their word."""

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, ends: Tensor, ends_k: Tensor, *longest: int, **options: Any
    ) -> Tensor:
        assert ends is ends_k
        assert longest == (max(LENGTHS), max(LENGTHS))
        assert options.pop("enable_gqa", None) == (True if shares_keys else None)
        assert shares_keys or q.shape == k.shape == v.shape
        left, right = options["window_size"]
        assert right == 0
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
        window = 1000 if left == -1 else left + 1  # a token sees itself and `left` tokens before it
        return block_mask_attention(*rows, options["scale"], window).squeeze(0)

    found = varlen if shares_keys else attention._for_each_head(varlen)
    monkeypatch.setattr(attention, "_varlen_attn", found)
    monkeypatch.setattr(attention, "_takes_flash", lambda x: True)
    inputs = heads(4, 2, 2)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "cu_seq_lens_q": ends}
    out, _ = attention.segment_sdpa(nn.Module(), *inputs, None, max_length_q=max(LENGTHS), **options)
    assert_close(out, block_mask_attention(*inputs, 0.3, window or 1000))


def test_flash_attention_is_for_half_precision_on_a_gpu() -> None:
    assert not attention._takes_flash(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    assert not attention._takes_flash(torch.zeros(1))


@pytest.mark.parametrize(
    ("implementation", "device", "pays"),
    [
        (attention.NAME, "cpu", True),
        (attention.NAME, "meta", False),  # neither a CPU, nor one with flash attention
        ("sdpa", "cpu", False),
        ("flash_attention_2", "meta", True),
    ],
)
def test_where_packing_pays(implementation: str, device: str, pays: bool) -> None:
    config = SimpleNamespace(_attn_implementation=implementation)
    assert attention.packing_pays(config, torch.zeros(1, device=device)) == pays


def patched(implementation: str, family: str = "llama", **options: Any) -> Any:
    base = tiny.base_model(family)
    base.set_attn_implementation(implementation)
    return tiny.patched(base, **options)


@pytest.mark.parametrize("loss", ["choice", "vocab"])
@pytest.mark.parametrize(
    ("implementation", "family"), [("sdpa", "llama"), ("sdpa", "mistral"), ("eager", "llama")]
)
def test_packed_equals_padded(implementation: str, family: str, loss: str) -> None:
    """Loss, answer logits and the gradient of every parameter."""
    model = patched(implementation, family, loss=loss)
    made = tiny.instances()
    results = []
    for layout in ("right", "packed"):
        out = model(**tiny.batch(made, layout))
        prediction = answer_logits(model, **tiny.batch(made, layout, answers=False))
        results.append((out.loss, out.answer_logits, prediction, tiny.gradients(model, out.loss)))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)  # transformers' norms and softmax are fp32


@pytest.mark.parametrize("kind", CHECKPOINTS[1:])
def test_packed_in_bfloat16_with_checkpoints(kind: str) -> None:
    model = tiny.patched(tiny.base_model(dtype=torch.bfloat16))
    batch = tiny.batch(tiny.instances(), "packed")
    expected = tiny.gradients(model, model(**batch).loss)
    set_checkpointing(model, kind)
    assert_close(tiny.gradients(model, model(**batch).loss), expected)


def test_the_first_layer_hands_no_gradient_to_frozen_embeddings() -> None:
    """Each linear layer is one product of the backward pass, but q, k and v of the first decoder layer."""
    model = tiny.patched(tiny.base_model(dtype=torch.float32), soft_prompt=False)
    model.rellax.set_trainable(lora=False)
    loss = model(**tiny.batch(tiny.instances(placeholders=False), "packed")).loss
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(loss, list(model.rellax.gate_bank.parameters()))
    names = [event.name for event in profile.events()]
    assert sum(names.count(name) for name in ("aten::mm", "aten::addmm_")) == 7 * 2 - 3


def test_packed_equals_padded_with_flex_attention() -> None:
    """As it runs on a CPU, compiled: it has no backward pass there."""
    base = tiny.base_model(dtype=torch.float32)
    base.set_attn_implementation("flex_attention")
    model = tiny.patched(base).eval()
    made = tiny.instances()
    with torch.no_grad():
        padded, packed = (model(**tiny.batch(made, layout)) for layout in ("right", "packed"))
    assert_close(
        (packed.loss, packed.answer_logits), (padded.loss, padded.answer_logits), rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_packed_and_padded_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By flex attention's unfused formulation, which has a backward pass that torch offers to GPUs alone."""

    def unfused(*inputs: Tensor, training: bool = False, **options: Any) -> Any:
        return flex_attention.flex_attention(*inputs, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", unfused)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    results = []
    for implementation, layout in (
        ("eager", "right"),
        ("flex_attention", "right"),
        ("flex_attention", "packed"),
    ):
        base = tiny.base_model(dtype=torch.float32)
        base.set_attn_implementation(implementation)
        model = tiny.patched(base)
        out = model(**tiny.batch(tiny.instances(), layout))
        results.append((out.loss, out.answer_logits, tiny.gradients(model, out.loss)))
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-3, atol=1e-4)


def test_flash_attention_of_transformers_gets_the_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its kernels, which no CPU has, takes offsets and longest instance at their word."""
    made, calls = tiny.instances(), []

    def varlen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        assert mask is None
        assert options["cu_seq_lens_q"] is options["cu_seq_lens_k"]
        assert options["max_length_q"] == options["max_length_k"] == max(tiny.LENGTHS)
        assert options.get("is_causal", module.is_causal)
        ends = options["cu_seq_lens_q"]
        assert ends.tolist() == [0, *accumulate(tiny.LENGTHS)]
        calls.append(module)
        lengths = ends.diff().tolist()
        return attention._each_segment(query, key, value, lengths, 0.0, options["scaling"], None), None

    model = patched("sdpa")
    batch = tiny.batch(made, "packed")
    expected = model(**batch)
    gradients = tiny.gradients(model, expected.loss)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
    model.config._attn_implementation = "flash_attention_2"
    for given in ({"max_seqlen": max(tiny.LENGTHS)}, {}):
        out = model(**batch | given)
        assert_close((out.loss, out.answer_logits), (expected.loss, expected.answer_logits))
        assert_close(tiny.gradients(model, out.loss), gradients)
    assert len(calls) == 2 * len(model.model.layers)
    assert packing_pays(model)


def test_segments_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("transformers looks for packed sequences to mask")

    model = patched("sdpa")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", fail)
    model(**tiny.batch(tiny.instances(), "packed"))


def test_transformers_names_of_a_packing_are_taken() -> None:
    model = patched("sdpa")
    batch = tiny.batch(tiny.instances(), "packed")
    expected = model(**batch).loss
    ends, longest = batch.pop("cu_seqlens"), max(tiny.LENGTHS)
    names = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    assert torch.equal(model(**batch, **names).loss, expected)


def test_patching_changes_sdpa_alone_and_unpatching_restores_it() -> None:
    for given, used in (("sdpa", attention.NAME), ("eager", "eager"), ("flex_attention", "flex_attention")):
        model = patched(given, soft_prompt=False)
        assert model.config._attn_implementation == used
        assert packing_pays(model) == (given == "sdpa")
        unpatch_model(model)
        assert model.config._attn_implementation == given


def test_an_implementation_that_is_set_later_is_used() -> None:
    model = patched("sdpa")
    batch = tiny.batch(tiny.instances(), "packed")
    expected = model(**batch).loss
    model.set_attn_implementation("eager")
    assert_close(model(**batch).loss, expected)
    assert not packing_pays(model)


def test_known_positions_change_nothing() -> None:
    for layout in ("right", "packed"):
        model = patched("sdpa", loss="vocab")
        batch = tiny.batch(tiny.instances(), layout)
        batch["labels"].view(-1)[3] = 5  # a second label of the first instance
        found = (batch["labels"].flatten() != -100).nonzero().squeeze(1) - 1
        expected, out = model(**batch), model(**batch, answer_positions=found)
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.answer_logits, expected.answer_logits)
        with pytest.raises(InputError, match=r"^answer_positions: expected the tokens before the labels"):
            model(**batch, answer_positions=found[:-1])
