"""``rellax::answer_loss``: loss and answer logits at the supervised positions only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rellax.ops import _answer_cpp as cpp
from rellax.ops._check import bad, can_read, check_number, check_range, check_tensor, is_floating
from rellax.ops._register import operator
from rellax.reference import answer as reference

LOSSES = ("vocab", "choice")
_SMALLEST = torch.finfo(torch.float32).tiny


def _check_values(
    hidden: Tensor, weight: Tensor, _bias: Tensor | None, positions: Tensor, labels: Tensor, *rest: Any
) -> None:
    _denominator, choice_ids, loss, *_ = rest
    check_range("positions", positions, hidden.shape[:-1].numel(), "row of hidden")
    if loss == "choice":
        check_choice_labels(labels, choice_ids)
    else:
        check_range("labels", labels[labels != reference.IGNORED], weight.shape[0], "token")


_forward = operator(
    "answer_loss",
    reference.answer_fwd,
    cpp=cpp.answer_fwd,
    cpp_dtypes=(torch.float32, torch.bfloat16),
    triton="rellax.kernels.answer:answer_fwd",
    triton_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    check=_check_values,
)
# It writes zeros and n rows: PyTorch does that at the memory's speed on every device.
_backward = operator(
    "answer_loss_backward",
    reference.answer_bwd,
    cpp=reference.answer_bwd,
    triton="rellax.reference.answer:answer_bwd",
)
_head_backward = operator(
    "answer_loss_head_backward",
    reference.answer_head_bwd,
    cpp=reference.answer_head_bwd,
    triton="rellax.reference.answer:answer_head_bwd",
)


def answer_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    positions: Tensor,
    labels: Tensor,
    *,
    choice_ids: Sequence[int] | None = None,
    loss: str | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the rows of `hidden` at `positions`, and the logits of the answer tokens there.

    Only those rows meet the language model's head, and (n, V) logits are never kept. The loss is the sum over
    the supervised rows divided by `denominator`; where no row is supervised, loss and gradients are 0. All is
    computed in fp32 or wider, under autocast too. Gradients: hidden, and lm_head_weight and bias where they
    require one; `logits` carries none.

    Args:
        hidden: (B, L, d), or packed (T, d); the last hidden states, any floating dtype.
        lm_head_weight: (V, d), any floating dtype.
        positions: (n,) int64, indices into the B · L or T rows of `hidden`.
        labels: (n,) int64, the token to be predicted from each row; -100 where there is none.
        choice_ids: the two answer tokens (No, Yes).
        loss: "vocab": cross-entropy over the vocabulary; "choice": over the two answer tokens, one of which
            every label is. Default: "choice" where `choice_ids` are given.
        bias: (V,), added to the logits.
        softcap: logits become softcap · tanh(logits / softcap).
        denominator: a positive number, or a tensor () as Trainer's `num_items_in_batch`; default: the number
            of labels that are not -100.

    Returns:
        loss () and logits (n, 2) in the order [No, Yes], or (n, 0) without `choice_ids`; both fp32, or fp64
        where hidden or lm_head_weight is.

    Raises:
        InputError: a shape, dtype, device or option does not fit. On a CPU also: a position or label is out
            of range, or for "choice" a label is not one of the two. On a GPU, which is not waited for, such
            a label makes the loss NaN.
    """
    if loss is None:
        loss = "vocab" if choice_ids is None else "choice"
    _check(hidden, lm_head_weight, bias, positions, labels)
    choice = check_choice(choice_ids, loss, lm_head_weight.shape[0])
    if softcap is not None:
        check_number("softcap", softcap, "a positive number", _SMALLEST)
    total = loss_denominator(denominator, labels)
    if lm_head_weight.dtype == torch.float64:
        hidden = hidden.double()  # its dtype chooses the backend
    needs = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, lm_head_weight, bias)
    ]
    value, logits, *_ = _forward(
        hidden, lm_head_weight, bias, positions, labels, total, choice, loss, softcap, needs
    )
    return value, logits.detach()


@_forward.register_fake
def _forward_fake(
    hidden: Tensor, weight: Tensor, _bias: Tensor | None, positions: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _labels, _denominator, choice_ids, loss, _softcap, (need_hidden, need_weight, need_bias) = rest
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    (n,), (V, d) = positions.shape, weight.shape
    head_rows = 2 if loss == "choice" else V
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((n, len(choice_ids)), dtype=dtype),
        hidden.new_empty((n, d) if need_hidden else (0,), dtype=dtype),
        hidden.new_empty((head_rows, d) if need_weight else (0,), dtype=dtype),
        hidden.new_empty(head_rows if need_bias else 0, dtype=dtype),
    )


@_backward.register_fake
def _backward_fake(
    _dloss: Tensor, dh: Tensor, _positions: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return dh.new_empty(shape, dtype=dtype)


@_head_backward.register_fake
def _head_backward_fake(
    _dloss: Tensor, gradient: Tensor, _choice_ids: Sequence[int], vocabulary: int
) -> Tensor:
    return gradient.new_empty((vocabulary, *gradient.shape[1:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _bias, positions, _labels, _denominator, choice_ids, loss, *_ = inputs
    _, _, dh, dweight, dbias = output
    ctx.save_for_backward(dh, dweight, dbias, positions)
    ctx.hidden = list(hidden.shape), hidden.dtype
    ctx.head = list(choice_ids) if loss == "choice" else [], weight.shape[0]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    dh, dweight, dbias, positions = ctx.saved_tensors
    need_hidden, need_weight, need_bias, *rest = ctx.needs_input_grad
    return (
        _backward(dloss, dh, positions, *ctx.hidden) if need_hidden else None,
        _head_backward(dloss, dweight, *ctx.head) if need_weight else None,
        _head_backward(dloss, dbias, *ctx.head) if need_bias else None,
        *(None for _ in rest),
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


def loss_denominator(given: float | Tensor | None, labels: Tensor) -> Tensor:
    """What the sum is divided by, as a tensor () on the labels' device."""
    if given is None:
        return (labels != reference.IGNORED).sum().clamp(min=1)
    if not isinstance(given, Tensor):
        check_number("denominator", given, "a positive number or a tensor ()", _SMALLEST)
        given = labels.new_full((), given, dtype=torch.float32)
    if given.dim() != 0 or given.is_complex() or given.dtype == torch.bool:
        raise bad("denominator", "a number or a tensor ()", given)
    if can_read(given) and not 0 < given < float("inf"):
        raise bad("denominator", "a positive number", given.item())
    return given.to(labels.device)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, labels: Tensor) -> None:
    if not is_floating(hidden) or hidden.dim() not in (2, 3):
        raise bad("hidden", "floating (B, L, d) or (T, d)", hidden)
    device = hidden.device
    check_tensor("lm_head_weight", weight, (None, hidden.shape[-1]), "(V, d)", device)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), "(V,)", device)
    check_tensor("positions", positions, (None,), "(n,)", device, torch.int64)
    check_tensor("labels", labels, tuple(positions.shape), "(n,)", device, torch.int64)


def _is_token(value: Any, vocabulary: int) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and 0 <= value < vocabulary


def check_choice(choice_ids: Sequence[int] | None, loss: str, vocabulary: int) -> list[int]:
    """The answer tokens as a list, empty where there are none."""
    if loss not in LOSSES:
        raise bad("loss", f"one of {', '.join(LOSSES)}", repr(loss))
    if choice_ids is None:
        if loss == "choice":
            raise bad("choice_ids", 'the two answer tokens for loss "choice"', None)
        return []
    ids: list[Any] = list(choice_ids) if isinstance(choice_ids, (list, tuple)) else []
    valid = len(ids) == 2 and all(_is_token(token, vocabulary) for token in ids) and ids[0] != ids[1]
    if not valid:
        raise bad("choice_ids", f"two different tokens (No, Yes) in [0, {vocabulary})", repr(choice_ids))
    return [int(token) for token in ids]


def check_choice_labels(labels: Tensor, choice_ids: Sequence[int]) -> None:
    """Raise unless every label is one of the two answers, or none. Reads the values."""
    no, yes = choice_ids
    other = labels[(labels != reference.IGNORED) & (labels != no) & (labels != yes)]
    if other.numel():
        raise bad("labels", f"choice_ids {(no, yes)} or {reference.IGNORED}", int(other[0]))
