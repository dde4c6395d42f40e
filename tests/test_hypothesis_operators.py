"""Operators on random arguments: right ones give what the reference does, wrong ones a sentence."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import examples, one_sentence
from hypothesis import given
from hypothesis import strategies as st
from test_answer import naive as naive_answer
from test_cflora import naive, naive_set, naive_update
from test_gate_bank import naive as naive_gates
from test_soft_prompt import naive as naive_soft_prompt
from torch import Tensor

import rellax.ops
from rellax.testing import cases, oracle

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is tested is the CPU's backend")

SIZES = st.sampled_from([1, 2, 3, 7, 16, 33, 65])
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 7, 33]), max_size=4)
DTYPES = st.sampled_from(cases.DTYPES)
LAYOUTS = ("plain", "offset", "transposed", "every-other", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other memory; "expanded": all rows are the first."""
    fill = math.nan if tensor.is_floating_point() else 2**30
    values = tensor.detach()
    if layout == "offset":
        buffer = values.new_full((values.numel() + 3,), fill)
        values = buffer[3:].view(values.shape).copy_(values)
    elif layout == "transposed" and values.dim() >= 2:
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "every-other" and values.dim() >= 1:
        buffer = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), fill)
        values = buffer[..., ::2].copy_(values)
    elif layout == "expanded" and values.dim() >= 2 and len(values) and values.is_floating_point():
        values = values[:1].expand_as(values)
    return values.requires_grad_(tensor.requires_grad)


@st.composite
def calls(draw: st.DrawFn, operator: str, options: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """A dtype and the keywords of a call, each tensor in a memory layout of its own."""
    build, _ = cases.OPERATORS[operator]
    dtype = draw(DTYPES)
    inputs = build(dtype, **{name: draw(strategy) for name, strategy in options.items()})

    # With all rows of the head alike, the gradient of the hidden states is nothing but rounding.
    layouts = LAYOUTS[:-1] if operator == "answer_loss" else LAYOUTS

    def relaid(value: Any) -> Any:
        if isinstance(value, list):
            return [relaid(part) for part in value]
        return laid_out(value, draw(st.sampled_from(layouts))) if isinstance(value, Tensor) else value

    return {"dtype": dtype, "inputs": {name: relaid(value) for name, value in inputs.items()}}


_CFLORA = {
    "lengths": LENGTHS,
    "d_in": SIZES,
    "r": st.sampled_from([1, 2, 3, 8, 17]),
    "packed": st.booleans(),
    "gate": st.sampled_from(["full", "diagonal", None]),
    "train_lora": st.booleans(),
    "lora_dtype": st.sampled_from([None, torch.float32]),
    "dropout": st.sampled_from([0.0, 0.3]),
}
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "cflora_linear": _CFLORA | {"d_out": SIZES, "bias": st.booleans()},
    "cflora_linears": _CFLORA | {"d_outs": st.lists(SIZES, min_size=1, max_size=3), "bias": st.booleans()},
    "cflora_update": _CFLORA | {"d_out": SIZES},
    "gate_bank": {
        "projections": st.sampled_from([1, 2, 5]),
        "instances": st.sampled_from([0, 1, 3, 9]),
        "d_u": SIZES,
        "r": st.sampled_from([1, 2, 3, 5]),
        "diagonal": st.booleans(),
        "u_dtype": st.sampled_from([None, torch.float32]),
        "train_u": st.booleans(),
    },
    "soft_prompt": {
        "shape": st.sampled_from([(1,), (7,), (0,), (2, 0), (1, 1), (3, 7), (2, 33)]),
        "vocabulary": SIZES,
        "d": SIZES,
        "rows": SIZES,
        "share": st.sampled_from([0.0, 0.4, 1.0]),
        "train_words": st.booleans(),
        "soft_dtype": st.sampled_from([None, torch.float32, torch.bfloat16]),
        "scale": st.sampled_from([None, 7.5]),
    },
    "answer_loss": {
        "shape": st.sampled_from([(40,), (1, 40), (3, 33)]),
        # Fewer tokens, and a gradient may be the little that two numbers differ by.
        "vocabulary": st.sampled_from([29, 65]),
        "d": st.sampled_from([7, 16, 33, 65]),
        "n": st.sampled_from([7, 33]),
        "choice_ids": st.sampled_from([None, (0, 2), (2, 1)]),
        "loss": st.sampled_from([None, "vocab"]),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, 2.0, 30]),
        "denominator": st.sampled_from([None, 16, 2.5]),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "train_head": st.booleans(),
    },
}
EAGER: dict[str, Callable[..., Any]] = {
    "cflora_linear": naive,
    "cflora_linears": naive_set,
    "cflora_update": naive_update,
    "gate_bank": naive_gates,
    "soft_prompt": naive_soft_prompt,
    "answer_loss": naive_answer,
}


def narrowest(inputs: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The dtype that the oracle allows for."""
    dtypes = [dtype, *(value.dtype for value in inputs.values() if isinstance(value, Tensor))]
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


@pytest.mark.parametrize("operator", OPTIONS)
def test_right_arguments_give_what_the_reference_does(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "ULPS", oracle.ULPS_OF_FEW)

    @examples(30)
    @given(calls(operator, OPTIONS[operator]))
    def check(call: dict[str, Any]) -> None:
        inputs = call["inputs"]
        function, eager = getattr(rellax.ops, operator), EAGER[operator]
        oracle.check(function, eager, inputs, narrowest(inputs, call["dtype"]))

    check()


@st.composite
def histories(draw: st.DrawFn) -> dict[str, Any]:
    """Embeddings whose products are exact, so that ids and scores are, too."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count, dim = draw(st.sampled_from([1, 2, 9, 50])), draw(st.sampled_from([0, 1, 3, 16, 33]))
    lengths = draw(st.lists(st.sampled_from([0, 1, 5, 40, 170]), max_size=4))
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    layout = st.sampled_from(LAYOUTS)
    embeddings = torch.randint(-4, 5, (count, dim), generator=generator).to(draw(DTYPES))
    inputs: dict[str, Any] = {
        "embeddings": laid_out(embeddings, draw(layout)),
        "items": laid_out(torch.randint(count, (sum(lengths),), generator=generator).to(index), draw(layout)),
        "offsets": laid_out(offsets.to(index), draw(layout)),
        "k": draw(st.sampled_from([1, 3, 30, 600])),
    }
    queries = draw(st.sampled_from([None, 0, 1, 20])) if lengths else None
    if queries is not None:
        user = torch.randint(len(lengths), (queries,), generator=generator)
        end = (torch.rand(queries, generator=generator) * (offsets.diff()[user] + 1)).long()
        target = torch.randint(count, (queries,), generator=generator)
        inputs |= {
            name: laid_out(tensor.to(index), draw(layout))
            for name, tensor in {"target": target, "user": user, "end": end}.items()
        }
    return inputs


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count, dim = draw(st.sampled_from([0, 1, 2, 31, 33, 100])), draw(st.sampled_from([0, 1, 3, 16, 33]))
    embeddings = torch.randint(-4, 5, (count, dim), generator=generator).to(draw(DTYPES))
    queries = draw(st.sampled_from([None, 0, 1, 20])) if count else None
    layout = st.sampled_from(LAYOUTS)
    rows = None if queries is None else torch.randint(count, (queries,), generator=generator)
    return {
        "embeddings": laid_out(embeddings, draw(layout)),
        "k": draw(st.sampled_from([1, 3, 30, 120])),
        "queries": None if rows is None else laid_out(rows, draw(layout)),
        "exclude_self": draw(st.booleans()),
    }


@pytest.mark.parametrize(("operator", "strategy"), [("history_topk", histories()), ("item_topk", tables())])
def test_right_searches_find_what_the_reference_does(
    operator: str, strategy: st.SearchStrategy[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = getattr(rellax.ops, operator)

    @examples(60)
    @given(strategy)
    def check(inputs: dict[str, Any]) -> None:
        with oracle.poisoned_memory():
            found = function(**inputs)
        with monkeypatch.context() as patch:
            patch.setenv("RELLAX_BACKEND", "reference")
            for got, expected in zip(found, function(**inputs), strict=True):
                assert torch.equal(got, expected)

    check()


# What is wrong for any tensor, and for the numbers.
NOT_TENSORS: tuple[Any, ...] = (1.5, 3, "text", True, [1.0, 2.0], np.ones((2, 2)), {}, object)
NUMBERS: dict[str, tuple[Any, ...]] = {
    "scale": (None, "2", math.nan, math.inf, -math.inf, [1.0], True, 1j),
    "dropout": (None, "0.1", math.nan, -0.1, 1.0, 2**70, [0.1], True),
    "eps": (None, "1e-5", math.nan, -1e-5, math.inf, True),
    "softcap": ("2", math.nan, 0, -1.0, math.inf, True, [2.0]),
    "denominator": ("2", math.nan, 0, -1.0, math.inf, True, [2.0], torch.ones(2), torch.tensor(math.nan)),
    "k": (None, "3", 1.5, 0, -1, 2**31, 2**63, 2**70, math.nan, True, [3]),
    "exclude_self": (None, "no", 0, 1.0),
    "loss": ("", "mean", 3, []),
    "choice_ids": (
        (1,),
        (1, 1),
        (0, 1, 2),
        (0.5, 1.0),
        (True, False),
        (-1, 1),
        (0, 2**63),
        "ab",
        3,
        (None, 1),
    ),
}
OPTIONAL = ("bias", "gate", "gates", "cu_seqlens", "tiles", "seed", "word_scale", "queries", "choice_ids")
OUTSIDE = {  # indices, and what limits them
    "answer_loss": ("positions", "labels"),
    "soft_prompt": ("input_ids", "soft_index"),
    "history_topk": ("items", "offsets", "target", "user", "end"),
    "item_topk": ("queries",),
    "cflora_linear": ("cu_seqlens",),
    "cflora_update": ("cu_seqlens",),
    "cflora_linears": ("cu_seqlens",),
}
WRONG_CASES: dict[str, list[dict[str, Any]]] = {
    "cflora_linear": [{}, {"packed": True, "lengths": [3, 0, 4], "dropout": 0.3}],
    "cflora_linears": [{}, {"packed": True, "lengths": [3, 0, 4], "dropout": 0.3}],
    "cflora_update": [{}, {"packed": True, "lengths": [3, 0, 4], "dropout": 0.3}],
    "gate_bank": [{}],
    "soft_prompt": [{"scale": 2.0, "share": 0.5}],
    "answer_loss": [{"bias": True}, {"choice_ids": (3, 5)}],
    "history_topk": [{}, {"queries": 7}],
    "item_topk": [{"queries": 7}],
}


def wrong_tensors(tensor: Tensor, *, resized: bool) -> dict[str, Any]:
    """Tensors that are wrong where `tensor` is right."""
    values = tensor.detach()
    wrong: dict[str, Any] = {
        "rank": values[None, None],
        "complex": values.to(torch.complex64),
        "bool": values > 0,
        "meta": values.to("meta"),
        "kind": values.long() if values.is_floating_point() else values.float(),
        "fp8": values.float().to(torch.float8_e4m3fn),
        "int8": values.to(torch.int8),
        "sparse": values.to_sparse(),
    }
    if resized and values.dim():
        wrong["longer"] = torch.cat([values, values[..., :1]], -1)
        wrong["scalar"] = values.flatten()[0]
    return wrong


@st.composite
def wrong_calls(draw: st.DrawFn, operator: str) -> tuple[str, str, dict[str, Any]]:
    """A right call but for one argument; its name, and what is wrong with it."""
    build, _ = cases.OPERATORS[operator]
    inputs = build(draw(DTYPES), **draw(st.sampled_from(WRONG_CASES[operator])))
    names = [name for name in inputs if inputs[name] is not None or name in NUMBERS]
    name = draw(st.sampled_from([*names, *(["exclude_self"] if operator == "item_topk" else [])]))
    value = inputs.get(name)
    if isinstance(value, list):
        place = draw(st.integers(0, len(value) - 1))
        what, wrong = draw(st.sampled_from([*wrong_tensors(value[place], resized=True).items()]))
        bad = draw(
            st.sampled_from([None, [], value * 2, 3, value[0], [*value[:place], wrong, *value[place + 1 :]]])
        )
        return name, what, inputs | {name: bad if bad is not None or name != "gates" else []}
    if name in NUMBERS:
        what, wrong = "number", draw(st.sampled_from(NUMBERS[name]))
        return name, what, inputs | {name: wrong}
    searched = operator in ("history_topk", "item_topk")
    choices = wrong_tensors(value, resized=not searched)
    choices |= {f"{type(x).__name__}": x for x in NOT_TENSORS}
    if name not in OPTIONAL:
        choices["none"] = None
    if name in OUTSIDE.get(operator, ()) and value.numel():
        place = draw(st.integers(0, value.numel() - 1))
        far = draw(st.sampled_from([-(2**31), 2**31 - 1, 10**6]))
        changed = value.clone()
        changed[np.unravel_index(place, tuple(value.shape))] = far
        choices |= {"outside": changed}
    what = draw(st.sampled_from(sorted(choices)))
    return name, what, inputs | {name: choices[what]}


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_a_wrong_argument_gives_a_sentence_that_names_one(operator: str) -> None:
    function = getattr(rellax.ops, operator)
    names = set(inspect.signature(function).parameters)
    names |= {"weight", "bias", "lora_a", "lora_b", "gate", "target, user, end"}

    @examples(80)
    @given(wrong_calls(operator))
    def check(call: tuple[str, str, dict[str, Any]]) -> None:
        name, what, inputs = call
        if operator == "soft_prompt" and what == "outside":
            wanted = inputs["soft_index"] >= 0
            words = inputs["input_ids"][~wanted]
            if name == "input_ids" and ((words >= 0) & (words < len(inputs["word_embeddings"]))).all():
                return  # an id that is never looked up
            if name == "soft_index" and inputs[name].max() < len(inputs["soft_rows"]):
                return  # any negative number is an ordinary token; its id may be none
        with one_sentence(*names):
            function(**inputs)

    check()


def test_nothing_is_computed_of_wrong_offsets() -> None:
    """Offsets that fall, begin elsewhere or end elsewhere."""

    @examples(60)
    @given(st.lists(st.integers(-3, 12), max_size=6))
    def check(ends: list[int]) -> None:
        offsets, tokens = torch.tensor(ends, dtype=torch.int32), 9
        right = bool(ends) and ends[0] == 0 and ends[-1] == tokens and sorted(ends) == ends
        packed = cases.cflora(torch.float32, packed=True, lengths=[tokens], gate=None) | {
            "cu_seqlens": offsets
        }
        history = {"embeddings": torch.ones(3, 2), "items": torch.zeros(tokens, dtype=torch.long), "k": 2}
        if right:
            rellax.ops.cflora_linear(**packed)
            rellax.ops.history_topk(**history, offsets=offsets)
            return
        with one_sentence("cu_seqlens"):
            rellax.ops.cflora_linear(**packed)
        with one_sentence("cu_seqlens"):
            rellax.ops.cflora_tiles(offsets, tokens)
        with one_sentence("offsets"):
            rellax.ops.history_topk(**history, offsets=offsets)

    check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("operator", ["history_topk", "item_topk"])
def test_embeddings_that_cannot_be_compared(operator: str, value: float) -> None:
    build, table = cases.OPERATORS[operator]
    for case in table.values():
        inputs = build(torch.float32, **case)
        inputs["embeddings"][:, 4] = value
        with one_sentence("embeddings"):
            getattr(rellax.ops, operator)(**inputs)
