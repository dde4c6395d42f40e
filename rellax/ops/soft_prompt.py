"""``rellax::soft_prompt``: the embedding of every token, a word's or a soft row, written in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rellax.ops import _soft_prompt_cpp as cpp
from rellax.ops._check import bad, check_range, check_tensor, is_strided
from rellax.ops._register import operator
from rellax.reference import soft_prompt as reference


def _reference(
    word_embeddings: Tensor,
    soft_rows: Tensor,
    input_ids: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None,
) -> Tensor:
    """The reference; on a CPU with the C++ kernel's look at the values."""
    if input_ids.device.type == "cpu":
        soft = soft_index >= 0
        check_range("soft_index", soft_index[soft], soft_rows.shape[0], "row of soft_rows")
        check_range("input_ids", input_ids[~soft], word_embeddings.shape[0], "row of word_embeddings")
    return reference.soft_prompt_fwd(word_embeddings, soft_rows, input_ids, soft_index, word_scale)


_forward = operator(
    "soft_prompt",
    _reference,
    cpp=cpp.soft_prompt_fwd,
    cpp_dtypes=cpp.DTYPES,
    triton="rellax.kernels.soft_prompt:soft_prompt_fwd",
    triton_dtypes=cpp.DTYPES,
)
_backward = operator(
    "soft_prompt_backward",
    reference.soft_prompt_bwd,
    cpp=cpp.soft_prompt_bwd,
    cpp_dtypes=cpp.DTYPES,
    triton="rellax.kernels.soft_prompt:soft_prompt_bwd",
    triton_dtypes=cpp.DTYPES,
)


def soft_prompt(
    input_ids: Tensor,
    word_embeddings: Tensor,
    soft_rows: Tensor,
    soft_index: Tensor,
    *,
    word_scale: Tensor | None = None,
) -> Tensor:
    """y_t = soft_rows[soft_index_t] where soft_index_t >= 0, else word_scale · word_embeddings[input_ids_t].

    ReLLaX's soft prompt. The id of a token that takes a soft row is never looked up: it may be anything, V or
    more too. Gradients: soft_rows, and word_embeddings (dense) where it requires one; the sums run in fp32 in
    a fixed order.

    Args:
        input_ids: (B, L), or packed (T,), int64.
        word_embeddings: (V, d), any floating dtype.
        soft_rows: (S, d), any floating dtype; S = 0 where no token takes one.
        soft_index: like input_ids, int64; row of `soft_rows`, any negative number for an ordinary token.
        word_scale: (), any floating dtype, what the model multiplies its word embeddings by (Gemma's
            `embed_scale`); rounded to word_embeddings' dtype, and a constant: it gets no gradient. None is 1.

    Returns:
        (B, L, d) or (T, d) in word_embeddings' dtype.

    Raises:
        InputError: a shape, dtype or device does not fit; on a CPU also: an id or index is out of range. On a
            GPU, which nobody waits for, such a token's embedding is NaN.
    """
    _check(input_ids, word_embeddings, soft_rows, soft_index, word_scale)
    y: Tensor = _forward(word_embeddings, soft_rows, input_ids, soft_index, word_scale)
    return y


@_forward.register_fake
def _forward_fake(word_embeddings: Tensor, _soft_rows: Tensor, input_ids: Tensor, *_: Any) -> Tensor:
    return word_embeddings.new_empty((*input_ids.shape, word_embeddings.shape[1]))


@_backward.register_fake
def _backward_fake(
    dy: Tensor, word_embeddings: Tensor | None, soft_rows: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    dwords, dsoft = (
        dy.new_empty(0) if table is None else table.new_empty(table.shape)
        for table in (word_embeddings, soft_rows)
    )
    return dwords, dsoft


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    # Saved tensors may be moved or offloaded: a frozen table must not be among them.
    tables = [table if ctx.needs_input_grad[i] else None for i, table in enumerate(inputs[:2])]
    ctx.save_for_backward(*tables, *inputs[2:])


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_words, need_soft, *_ = ctx.needs_input_grad
    dwords, dsoft = _backward(dy, *ctx.saved_tensors)
    return dwords if need_words else None, dsoft if need_soft else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check(
    input_ids: Tensor,
    word_embeddings: Tensor,
    soft_rows: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None,
) -> None:
    if not is_strided(input_ids) or input_ids.dim() not in (1, 2) or input_ids.dtype != torch.int64:
        raise bad("input_ids", "(B, L) or (T,), int64", input_ids)
    device, shape = input_ids.device, tuple(input_ids.shape)
    check_tensor("soft_index", soft_index, shape, "input_ids' shape", device, torch.int64)
    check_tensor("word_embeddings", word_embeddings, (None, None), "(V, d)", device)
    check_tensor("soft_rows", soft_rows, (None, word_embeddings.shape[1]), "(S, d)", device)
    if word_scale is not None:
        check_tensor("word_scale", word_scale, (), "()", device)
        if torch.is_grad_enabled() and word_scale.requires_grad:
            raise bad("word_scale", "a constant (requires_grad False)", "a tensor that requires a gradient")
