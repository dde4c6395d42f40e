"""``rellax._C``'s pass over a head as an implementation of ``rellax::answer_loss``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rellax.kernels._host import rows_of
from rellax.ops._check import dtype_name
from rellax.ops._register import extension
from rellax.reference import answer as reference

_ROWS = 32
"""Rows that go over the head together; the sums that threads keep for each take memory."""


def answer_fwd(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    labels: Tensor,
    denominator: Tensor,
    choice_ids: Sequence[int],
    loss: str,
    softcap: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``rellax.reference.answer.answer_fwd``, for fp32 and bf16.

    The kernel does the loss over the vocabulary of a frozen head. The reference does the rest: two rows of a
    head are little work, and a head's own gradient is a product that torch does well.
    """
    need_hidden, need_weight, need_bias = needs
    if loss == "choice" or need_weight or need_bias or lm_head_weight.dtype != hidden.dtype:
        return reference.answer_fwd(
            hidden, lm_head_weight, bias, positions, labels, denominator, choice_ids, loss, softcap, needs
        )
    bias = None if bias is None else bias.float().contiguous()
    rows = hidden.flatten(0, -2)[positions]
    two_rows = reference.select_rows(lm_head_weight, bias, choice_ids)
    choice = reference.head_logits(rows.float(), *two_rows, softcap).contiguous()
    ignored = labels == reference.IGNORED
    rows, labels = rows.masked_fill(ignored[:, None], 0), labels.masked_fill(ignored, 0)
    lse, mean = _pass(rows, lm_head_weight, bias, softcap, need_hidden)

    target = lm_head_weight[labels].float()
    logits = (rows * target).sum(1) if bias is None else (rows * target).sum(1) + bias[labels]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    share = ~ignored / denominator.float()
    value = ((lse - logits).masked_fill(ignored, 0) * share).sum()
    if need_hidden:
        slope = 1 if softcap is None else 1 - (logits / softcap).square()[:, None]
        mean = (mean - slope * target) * share[:, None]
    return value, choice, mean, mean.new_empty(0), mean.new_empty(0)


def _pass(
    rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, need_mean: bool
) -> tuple[Tensor, Tensor]:
    """lse (n,) and mean (n, d), or (0,), as in csrc/answer.h."""
    (n, d), weight = rows.shape, rows_of(weight)
    lse = rows.new_empty(n, dtype=torch.float32)
    mean = lse.new_empty((n, d) if need_mean else 0)
    for first in range(0, n, _ROWS):
        part = slice(first, first + _ROWS)
        extension().answer_forward(
            dtype=dtype_name(weight.dtype),
            n=len(rows[part]),
            d=d,
            vocabulary=weight.shape[0],
            rows=rows[part].data_ptr(),
            weight=weight.data_ptr(),
            weight_stride=weight.stride(0),
            bias=0 if bias is None else bias.data_ptr(),
            softcap=softcap or 0.0,
            lse=lse[part].data_ptr(),
            mean=mean[part].data_ptr() if need_mean else 0,
            threads=torch.get_num_threads(),
        )
    return lse, mean
