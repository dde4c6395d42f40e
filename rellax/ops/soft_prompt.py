"""``rellax::soft_prompt``: the embedding of every token, a word's or a soft row, written in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rellax.ops._check import bad, can_read, check_range, check_tensor
from rellax.ops._register import operator
from rellax.reference import soft_prompt as reference

_forward = operator("soft_prompt", reference.soft_prompt_fwd)
_backward = operator("soft_prompt_backward", reference.soft_prompt_bwd)


def soft_prompt(input_ids: Tensor, word_embeddings: Tensor, soft_rows: Tensor, soft_index: Tensor) -> Tensor:
    """y_t = soft_rows[soft_index_t] where soft_index_t >= 0, else word_embeddings[input_ids_t] (ReLLaX).

    The id of a token that takes a soft row is never looked up: it may be anything, V or more too. Gradients:
    soft_rows, and word_embeddings (dense) where it requires one; the sums run in fp32 in a fixed order.

    Args:
        input_ids: (B, L), or packed (T,), int64.
        word_embeddings: (V, d), any floating dtype.
        soft_rows: (S, d), any floating dtype; S = 0 where no token takes one.
        soft_index: like input_ids, int64; row of `soft_rows`, any negative number for an ordinary token.

    Returns:
        (B, L, d) or (T, d) in word_embeddings' dtype.

    Raises:
        InputError: a shape, dtype or device does not fit; on a CPU, outside of torch.compile, also: an id
            or index is out of range.
    """
    _check(input_ids, word_embeddings, soft_rows, soft_index)
    y: Tensor = _forward(input_ids, word_embeddings, soft_rows, soft_index)
    return y


@_forward.register_fake
def _forward_fake(input_ids: Tensor, word_embeddings: Tensor, *_: Tensor) -> Tensor:
    return word_embeddings.new_empty((*input_ids.shape, word_embeddings.shape[1]))


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    _input_ids: Tensor,
    word_embeddings: Tensor | None,
    soft_rows: Tensor | None,
    _soft_index: Tensor,
) -> tuple[Tensor, Tensor]:
    dwords, dsoft = (
        dy.new_empty(0) if table is None else torch.empty_like(table)
        for table in (word_embeddings, soft_rows)
    )
    return dwords, dsoft


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # Saved tensors may be moved or offloaded: a frozen table must not be among them.
    ctx.save_for_backward(
        *(
            tensor if needed or not tensor.is_floating_point() else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        )
    )


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, need_words, need_soft, _ = ctx.needs_input_grad
    dwords, dsoft = _backward(dy, *ctx.saved_tensors)
    return None, dwords if need_words else None, dsoft if need_soft else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _check(input_ids: Tensor, word_embeddings: Tensor, soft_rows: Tensor, soft_index: Tensor) -> None:
    device, shape = input_ids.device, tuple(input_ids.shape)
    if input_ids.dim() not in (1, 2) or input_ids.dtype != torch.int64:
        raise bad("input_ids", "(B, L) or (T,), int64", input_ids)
    check_tensor("soft_index", soft_index, shape, "input_ids' shape", device, torch.int64)
    check_tensor("word_embeddings", word_embeddings, (None, None), "(V, d)", device)
    check_tensor("soft_rows", soft_rows, (None, word_embeddings.shape[1]), "(S, d)", device)
    if can_read(input_ids):
        soft = soft_index >= 0
        check_range("input_ids", input_ids[~soft], word_embeddings.shape[0], "row of word_embeddings")
        check_range("soft_index", soft_index[soft], soft_rows.shape[0], "row of soft_rows")
