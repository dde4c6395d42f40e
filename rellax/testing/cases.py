"""Inputs of the operators: for each a builder and a table of named cases.

``cflora(torch.bfloat16, **CFLORA["odd"])`` gives the keywords of one call, with random, seeded values. Every
tensor that may require a gradient does, unless the case says otherwise.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Table = dict[str, dict[str, Any]]

CFLORA: Table = {
    "plain": {},
    "ones": {"lengths": [1], "d_in": 1, "d_out": 1, "r": 1},
    "odd": {"lengths": [7, 7, 7], "d_in": 129, "d_out": 7, "r": 3},
    "many-tokens": {"lengths": [129, 129], "d_in": 65, "d_out": 130, "r": 17},
    "rank-64": {"lengths": [5, 5], "d_in": 96, "d_out": 80, "r": 64},
    "diagonal-gate": {"gate": "diagonal"},
    "no-gate": {"gate": None},
    "no-bias": {"bias": False},
    "frozen-lora": {"train_lora": False},
    "fp32-lora": {"lora_dtype": torch.float32},
    "strided-x": {"strided": True},
    "dropout": {"dropout": 0.3},
    "no-tokens": {"lengths": [0, 0]},
    "no-instances": {"lengths": []},
    "no-inputs": {"d_in": 0},
    "no-outputs": {"d_out": 0},
    "packed": {"packed": True, "lengths": [7, 1, 129], "d_in": 33, "d_out": 17, "r": 8},
    "packed-empty-instances": {"packed": True, "lengths": [0, 7, 0, 0, 5, 0]},
    "packed-no-gate": {"packed": True, "gate": None},
    "packed-dropout": {"packed": True, "dropout": 0.3},
    "packed-strided-x": {"packed": True, "strided": True},
    "packed-no-instances": {"packed": True, "lengths": []},
}

CFLORA_SET: Table = {
    "plain": {},
    "alone": {"d_outs": (9,)},
    "odd": {"lengths": [7, 7, 7], "d_in": 129, "d_outs": (7, 1, 65), "r": 3},
    "many-tokens": {"lengths": [129, 129], "d_in": 65, "d_outs": (130, 33), "r": 17},
    "rank-64": {"lengths": [5, 5], "d_in": 96, "d_outs": (80, 33), "r": 64},
    "no-gate": {"gate": None},
    "no-bias": {"bias": False},
    "frozen-lora": {"train_lora": False},
    "dropout": {"dropout": 0.3},
    "no-tokens": {"lengths": [0, 0]},
    "packed-dropout": {"packed": True, "lengths": [7, 0, 33], "dropout": 0.3},
}

CFLORA_LAYERS = ((16, 1), (16, 9), (32, 1), (32, 5), (64, 1), (64, 3))
"""Ranks and numbers of layers, for each block of components that Triton's kernels know."""

CFLORA_BLOCKS: Table = {
    f"{length}-rank-{rank}-layers-{layers}": {
        "packed": True,
        "lengths": lengths,
        "d_in": 135,
        "d_outs": [135, *[1] * (layers - 1)],
        "r": rank,
        "train_lora": False,
    }
    for length, lengths in {"short": [1, 17], "long": [67]}.items()
    for rank, layers in CFLORA_LAYERS
}
"""Of ``cflora_set``: every block that the launchers of Triton's kernels can choose."""

CFLORA_UPDATE: Table = {
    "plain": {},
    "odd": {"lengths": [7, 7, 7], "d_in": 129, "d_out": 7, "r": 3},
    "dropout": {"dropout": 0.3},
    "packed": {"packed": True, "lengths": [7, 1, 129], "d_in": 33, "d_out": 17, "r": 8},
    "no-gate": {"gate": None},
}

GATE_BANK: Table = {
    "plain": {},
    "ones": {"projections": 1, "instances": 1, "d_u": 1, "r": 1},
    "odd": {"projections": 3, "instances": 7, "d_u": 5, "r": 3},
    "many-instances": {"instances": 129, "d_u": 64, "r": 8},
    "many-projections": {"projections": 17, "d_u": 17, "r": 4},
    "long-sums": {"projections": 1, "instances": 300, "d_u": 33, "r": 8},
    "rank-12": {"instances": 9, "r": 12},
    "rank-16": {"projections": 1, "d_u": 33, "r": 16},
    "diagonal": {"diagonal": True, "r": 5},
    "diagonal-rank-1": {"diagonal": True, "r": 1},
    "fp32-u": {"u_dtype": torch.float32},
    "bf16-u": {"u_dtype": torch.bfloat16},
    "frozen-u": {"train_u": False},
    "strided-u": {"strided": True},
    "no-instances": {"instances": 0},
}

SOFT_PROMPT: Table = {
    "plain": {},
    "ones": {"shape": (1, 1), "vocabulary": 1, "d": 1, "rows": 1, "share": 1.0},
    "odd": {"shape": (3, 7), "vocabulary": 129, "d": 129, "rows": 7},
    "many-tokens": {"shape": (2, 129), "vocabulary": 300, "d": 65, "rows": 129},
    "one-row-often": {"shape": (4, 33), "rows": 1},
    "packed": {"shape": (129,)},
    "only-words": {"rows": 0, "share": 0.0},
    "only-soft": {"share": 1.0},
    "frozen-words": {"train_words": False},
    "fp32-soft-rows": {"soft_dtype": torch.float32},
    "scaled-words": {"scale": 7.5},
    "strided": {"strided": True},
    "wide": {"shape": (2, 3), "d": 2060},
    "no-tokens": {"shape": (2, 0)},
}

ANSWER: Table = {
    "vocab": {},
    "ones": {"shape": (1, 1), "vocabulary": 1, "d": 1, "n": 1},
    "many-rows": {"shape": (2, 129), "vocabulary": 65, "d": 7, "n": 129},
    "wide": {"vocabulary": 257, "d": 129},
    "softcap": {"softcap": 2.0},
    "high-softcap": {"softcap": 30.0, "train_head": False},
    "bias": {"bias": True},
    "banned-tokens": {"bias": True, "banned": 2112, "vocabulary": 2200, "train_head": False},
    "frozen-head": {"train_head": False},
    "packed": {"shape": (33,)},
    "denominator": {"denominator": 16},
    "vocab-and-choice-logits": {"choice_ids": (7, 3), "loss": "vocab"},
    "choice": {"choice_ids": (2, 28)},
    "choice-softcap-bias": {"choice_ids": (5, 2), "softcap": 2.0, "bias": True},
    "choice-frozen-head": {"choice_ids": (5, 2), "train_head": False},
    "all-ignored": {"choice_ids": (5, 2), "ignored": 1.0},
    "no-positions": {"n": 0},
}


HISTORY_TOPK: Table = {
    "every-behaviour": {},
    "queries": {"queries": 7},
}

ITEM_TOPK: Table = {
    "every-item": {},
    "queries": {"queries": 7},
}


def device() -> torch.device:
    """Where tests run: on the GPU where there is one, unless Triton's interpreter is asked for."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")


def cflora(
    dtype: torch.dtype,
    *,
    lengths: Sequence[int] = (7, 7),
    d_in: int = 33,
    d_out: int = 9,
    r: int = 4,
    packed: bool = False,
    gate: str | None = "full",
    bias: bool = True,
    train_lora: bool = True,
    lora_dtype: torch.dtype | None = None,
    strided: bool = False,
    dropout: float = 0.0,
    draw: int = 0,
) -> dict[str, Any]:
    """Keywords of ``cflora_linear``; padded instances (not `packed`) all have the same length."""
    new = _Source(draw)
    length = lengths[0] if lengths else 3
    tokens = (sum(lengths),) if packed else (len(lengths), length)
    gates = new.tensor(len(lengths), r, r, dtype=lora_dtype or dtype)
    if gate == "diagonal":
        gates = gates * torch.eye(r, dtype=gates.dtype, device=gates.device)
    offsets = [0, *itertools.accumulate(lengths)]
    x = new.tensor(*tokens, 2 * d_in if strided else d_in, dtype=dtype)
    narrow = max(d_in, 1) ** -0.5
    return {
        "x": (x[..., 1::2] if strided else x).requires_grad_(),
        "weight": new.tensor(d_out, d_in, dtype=dtype, scale=narrow),
        "bias": new.tensor(d_out, dtype=dtype) if bias else None,
        "lora_a": new.tensor(r, d_in, dtype=lora_dtype or dtype, scale=narrow).requires_grad_(train_lora),
        "lora_b": new.tensor(d_out, r, dtype=lora_dtype or dtype, scale=r**-0.5).requires_grad_(train_lora),
        "gate": gates.requires_grad_() if gate else None,
        "scale": 2.0,
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32, device=device()) if packed else None,
        "dropout": dropout,
        "seed": torch.tensor(2**40 + 17, device=device()) if dropout else None,
    }


def cflora_set(dtype: torch.dtype, *, d_outs: Sequence[int] = (9, 7, 9), **options: Any) -> dict[str, Any]:
    """Keywords of ``cflora_linears``: layers of these output sizes; `options` are those of `cflora`."""
    calls = [cflora(dtype, d_out=d_out, draw=i, **options) for i, d_out in enumerate(d_outs)]
    shared = {name: calls[0][name] for name in ("x", "scale", "cu_seqlens", "dropout", "seed")}
    names = {"weight": "weights", "bias": "biases", "lora_a": "loras_a", "lora_b": "loras_b", "gate": "gates"}
    lists = {plural: [call[name] for call in calls] for name, plural in names.items()}
    return shared | lists | ({} if calls[0]["gate"] is not None else {"gates": None})


def cflora_update(dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """Keywords of ``cflora_update``; `options` are those of `cflora`."""
    inputs = cflora(dtype, **options)
    weight, _ = inputs.pop("weight"), inputs.pop("bias")
    base = _Source(1).tensor(*inputs["x"].shape[:-1], weight.shape[0], dtype=dtype)
    return {"base": base.requires_grad_(), **inputs}


def gate_bank(
    dtype: torch.dtype,
    *,
    projections: int = 2,
    instances: int = 3,
    d_u: int = 9,
    r: int = 2,
    diagonal: bool = False,
    u_dtype: torch.dtype | None = None,
    train_u: bool = True,
    strided: bool = False,
) -> dict[str, Any]:
    """Keywords of ``gate_bank``."""
    new = _Source()
    hidden, n = 2 * r * r, r if diagonal else r * r
    u = new.tensor(instances, 2 * d_u if strided else d_u, dtype=u_dtype or dtype)
    parameters = {
        "ln_weight": new.tensor(projections, d_u, dtype=dtype),
        "ln_bias": new.tensor(projections, d_u, dtype=dtype),
        "w1": new.tensor(projections, hidden, d_u, dtype=dtype, scale=d_u**-0.5),
        "b1": new.tensor(projections, hidden, dtype=dtype),
        "w2": new.tensor(projections, n, hidden, dtype=dtype, scale=hidden**-0.5),
        "b2": new.tensor(projections, n, dtype=dtype),
    }
    return {
        "u": (u[:, 1::2] if strided else u).requires_grad_(train_u),
        **{name: parameter.requires_grad_() for name, parameter in parameters.items()},
    }


def soft_prompt(
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...] = (2, 7),
    vocabulary: int = 11,
    d: int = 9,
    rows: int = 5,
    share: float = 0.4,
    train_words: bool = True,
    soft_dtype: torch.dtype | None = None,
    scale: float | None = None,
    strided: bool = False,
) -> dict[str, Any]:
    """Keywords of ``soft_prompt``; a `share` of the tokens takes a soft row and has no word's id."""
    new = _Source()
    soft = new.uniform(*shape) < share
    ids = new.integers(vocabulary, *shape)
    words = new.tensor(vocabulary, 2 * d if strided else d, dtype=dtype)
    soft_rows = new.tensor(rows, 2 * d if strided else d, dtype=soft_dtype or dtype)
    return {
        "input_ids": torch.where(soft, torch.where(new.uniform(*shape) < 0.5, ids + vocabulary, -5), ids),
        "word_embeddings": (words[:, 1::2] if strided else words).requires_grad_(train_words),
        "soft_rows": soft_rows[:, :d].requires_grad_(),
        "soft_index": torch.where(soft, new.integers(max(rows, 1), *shape), -1),
        "word_scale": None if scale is None else torch.tensor(scale, device=device()),
    }


def answer(
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...] = (3, 7),
    vocabulary: int = 29,
    d: int = 9,
    n: int = 7,
    choice_ids: tuple[int, int] | None = None,
    loss: str | None = None,
    bias: bool = False,
    banned: int = 0,
    softcap: float | None = None,
    denominator: float | None = None,
    ignored: float = 0.3,
    train_head: bool = True,
) -> dict[str, Any]:
    """Keywords of ``answer_loss``; a share of the labels is `ignored`, though never only the first.

    Of so many `banned` tokens, the first ones, none is a label and the bias is -inf.
    """
    new = _Source()
    tokens = torch.Size(shape).numel()
    positions = torch.randperm(tokens, generator=new.generator)[:n].to(device())
    labels = banned + new.integers(vocabulary - banned, n)
    if choice_ids is not None and loss != "vocab":
        labels = torch.tensor(choice_ids, device=device())[labels % 2]
    drop = new.uniform(n) < ignored
    drop[:1] &= ignored == 1.0
    ban = torch.arange(vocabulary, device=device()) < banned
    return {
        "hidden": new.tensor(*shape, d, dtype=dtype).requires_grad_(),
        "lm_head_weight": new.tensor(vocabulary, d, dtype=dtype, scale=d**-0.5).requires_grad_(train_head),
        "positions": positions,
        "labels": labels.masked_fill(drop, -100),
        "choice_ids": choice_ids,
        "loss": loss,
        "bias": new.tensor(vocabulary, dtype=dtype).masked_fill_(ban, -torch.inf).requires_grad_(train_head)
        if bias
        else None,
        "softcap": softcap,
        "denominator": denominator,
    }


def history_topk(
    dtype: torch.dtype, *, lengths: Sequence[int] = (7, 0, 12), items: int = 20, queries: int | None = None
) -> dict[str, Any]:
    """Keywords of ``history_topk``; without `queries` every behaviour is a target."""
    new = _Source()
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device())
    inputs = {
        "embeddings": F.normalize(new.tensor(items, 9, dtype=torch.float32)).to(dtype),
        "items": new.integers(items, sum(lengths)),
        "offsets": offsets,
        "k": 3,
    }
    if queries is None:
        return inputs
    user = new.integers(len(lengths), queries)
    end = (new.uniform(queries) * (offsets.diff()[user] + 1)).long()
    return {**inputs, "target": new.integers(items, queries), "user": user, "end": end}


def item_topk(dtype: torch.dtype, *, items: int = 20, queries: int | None = None) -> dict[str, Any]:
    """Keywords of ``item_topk``; without `queries` every item is one."""
    new = _Source()
    embeddings = F.normalize(new.tensor(items, 9, dtype=torch.float32)).to(dtype)
    return {
        "embeddings": embeddings,
        "k": 3,
        "queries": None if queries is None else new.integers(items, queries),
    }


class _Source:
    """Random tensors of a fixed seed, the same on every device."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=self.generator)
        return values.to(device(), dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(device())

    def integers(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator).to(device())


OPERATORS: dict[str, tuple[Callable[..., dict[str, Any]], Table]] = {
    "answer_loss": (answer, ANSWER),
    "cflora_linear": (cflora, CFLORA),
    "cflora_linears": (cflora_set, CFLORA_SET),
    "cflora_update": (cflora_update, CFLORA_UPDATE),
    "gate_bank": (gate_bank, GATE_BANK),
    "history_topk": (history_topk, HISTORY_TOPK),
    "item_topk": (item_topk, ITEM_TOPK),
    "soft_prompt": (soft_prompt, SOFT_PROMPT),
}
"""The builder and the table of every public operator."""
