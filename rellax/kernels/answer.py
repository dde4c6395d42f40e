"""The answer head on a GPU: two passes over some rows' logits, between torch's products with the head.

    logits = h Wᵀ        in fp32, torch; at most `_LOGITS` of them at once
    statistics           largest and Σ exp of each block of a row's logits, and its label's logit: one read
    gradient             the row's loss, and softmax - onehot in W's dtype: one read, one write
    dh, dW               torch's products with the gradients

A row is cut into blocks, so that a few rows keep the whole GPU busy; each block of the second pass merges the
row's statistics anew, in the same order. The reference, ``rellax.reference.answer``, has the maths.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.kernels._build import Build, meta, record
from rellax.kernels._host import cdiv, next_power_of_2
from rellax.kernels._tuning import Tuned

_IGNORED = -100
_LOGITS = 2**25
_BLOCK = Tuned("answer", {"BLOCK": 4096, "num_warps": 8})


@triton.jit
def _tanh(x):
    """In fp32 to some ulps: near 0, where 1 - 1 would be left of exponentials, by its series."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _logits(logits_ptr, bias_ptr, row, column, vocabulary, softcap):
    """cap(logits + bias) of one row, in fp32; -inf past the vocabulary."""
    inside = column < vocabulary
    logits = tl.load(logits_ptr + row.to(tl.int64) * vocabulary + column, mask=inside, other=0.0)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if softcap is not None:
        logits = softcap * _tanh(logits / softcap)
    return tl.where(inside, logits, -float("inf"))


@triton.jit
def _statistics_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    largest_ptr,
    total_ptr,
    target_ptr,
    vocabulary,
    softcap,
    BLOCK: tl.constexpr,
):
    """Of a block of a row: its largest logit, Σ exp(logit - largest), and the label's logit if it is here."""
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    logits = _logits(logits_ptr, bias_ptr, row, column, vocabulary, softcap)
    largest = tl.max(logits, 0)
    total = tl.sum(tl.exp(logits - tl.where(largest == -float("inf"), 0.0, largest)), 0)
    part = row * tl.num_programs(1) + block
    tl.store(largest_ptr + part, largest)
    tl.store(total_ptr + part, total)
    label = tl.load(labels_ptr + row)
    target = tl.sum(tl.where(column == label, logits, 0.0), 0)
    here = (label >= block * BLOCK) & (label < tl.minimum((block + 1) * BLOCK, vocabulary))
    tl.store(target_ptr + row, target, mask=here)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    largest_ptr,
    total_ptr,
    target_ptr,
    loss_ptr,
    dlogits_ptr,
    vocabulary,
    blocks,
    softcap,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The row's loss and, where `dlogits_ptr` is not None, one block of its gradient; 0 without a label.

    Both are NaN where the label is no column.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, BLOCKS)
    largest = tl.load(largest_ptr + row * blocks + part, mask=part < blocks, other=-float("inf"))
    total = tl.load(total_ptr + row * blocks + part, mask=part < blocks, other=0.0)
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    label = tl.load(labels_ptr + row)
    if block == 0:
        loss = lse - tl.load(target_ptr + row)
        tl.store(loss_ptr + row, tl.where(label == IGNORED, 0.0, loss))
    if dlogits_ptr is not None:
        column = block * BLOCK + tl.arange(0, BLOCK)
        logits = _logits(logits_ptr, bias_ptr, row, column, vocabulary, softcap)
        gradient = tl.exp(logits - lse) - tl.where(column == label, 1.0, 0.0)
        if softcap is not None:
            capped = tl.where(column < vocabulary, logits / softcap, 0.0)
            gradient *= 1 - capped * capped
        gradient = tl.where((label >= 0) & (label < vocabulary), gradient, float("nan"))
        gradient = tl.where(label == IGNORED, 0.0, gradient)
        out = dlogits_ptr + row.to(tl.int64) * vocabulary + column
        tl.store(out, gradient.to(dlogits_ptr.dtype.element_ty), mask=column < vocabulary)


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
    """As ``rellax.reference.answer.answer_fwd``, for fp32, bf16 and fp16.

    Gradients of logits are rounded to W's dtype, before they are divided by the denominator.
    """
    need_hidden, need_weight, need_bias = needs
    rows, labels, weight = hidden.flatten(0, -2)[positions], labels.contiguous(), lm_head_weight
    bias = None if bias is None else bias.contiguous()
    choice = rows.new_empty((len(rows), 0), dtype=torch.float32)
    if choice_ids:
        two_rows = _select(weight, choice_ids), None if bias is None else _select(bias, choice_ids)
        choice = _product(rows, two_rows[0].t())
        if two_rows[1] is not None:
            choice += two_rows[1]
        if softcap is not None:
            choice = softcap * torch.tanh(choice / softcap)
    if loss == "choice":
        weight, bias = two_rows
        other = torch.where(labels == _IGNORED, _IGNORED, 2)  # no row of the two: the loss is NaN
        labels = torch.where(labels == choice_ids[0], 0, torch.where(labels == choice_ids[1], 1, other))

    rows = rows.masked_fill((labels == _IGNORED)[:, None], 0)
    losses = torch.empty_like(labels, dtype=torch.float32)
    drows = losses.new_empty(rows.shape if need_hidden else 0)
    dweight = losses.new_zeros(weight.shape if need_weight else 0)
    dbias = losses.new_zeros(weight.shape[0] if need_bias else 0)
    gradient_dtype = weight.dtype if any(needs) else None
    step = max(_LOGITS // weight.shape[0], 1)
    for first in range(0, len(labels), step):
        part = slice(first, first + step)
        logits = _product(rows[part], weight.t())
        dlogits = _launch(logits, bias, labels[part], losses[part], softcap, gradient_dtype)
        if dlogits is None:
            continue
        if need_hidden:
            drows[part] = _product(dlogits, weight)
        if need_weight:
            dweight += _product(dlogits.t(), rows[part])
        if need_bias:
            dbias += dlogits.sum(0, dtype=torch.float32)
    share = denominator.float().reciprocal()
    return losses.sum() * share, choice, drows.mul_(share), dweight.mul_(share), dbias.mul_(share)


def _launch(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    softcap: float | None,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """Write the rows' losses; return their logits' gradients in `dtype`, in the same memory if they fit."""
    (n, vocabulary), dlogits = logits.shape, None
    if dtype is not None:
        dlogits = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    block = _BLOCK.on(logits.device)
    blocks = cdiv(vocabulary, block["BLOCK"])
    largest, total = logits.new_empty(2, n, blocks)
    target = logits.new_full((n,), torch.nan)  # for labels that are no column
    common = (logits, bias, labels, largest, total, target)
    with torch.cuda.device_of(logits):
        _statistics_kernel[(n, blocks)](*common, vocabulary, softcap, **block)
        _gradient_kernel[(n, 1 if dlogits is None else blocks)](
            *common,
            losses,
            dlogits,
            vocabulary,
            blocks,
            softcap,
            IGNORED=_IGNORED,
            BLOCKS=next_power_of_2(blocks),
            **block,
        )
    return dlogits


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32; most GPUs multiply half precision matrices so without widened copies of them."""
    if left.dtype == right.dtype and left.dtype != torch.float32 and _adds_up_in_fp32(left.device):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _adds_up_in_fp32(device: torch.device) -> bool:
    """Whether torch.mm has an `out_dtype` there."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    reduced = torch.backends.cuda.matmul.allow_fp16_accumulation
    return not reduced and torch.cuda.get_device_capability(device) >= (8, 0)


def _select(table: Tensor, tokens: Sequence[int]) -> Tensor:
    """These rows, without a tensor of indices, whose copy to the GPU the host would wait for."""
    return torch.cat([table[:0], *(table[token : token + 1] for token in tokens)])


def builds() -> Iterator[Build]:
    """For vocabularies of one block and of 2^18 tokens, with and without gradients."""
    dtypes, either = (torch.float32, torch.bfloat16, torch.float16), (False, True)
    for backend, dtype, extras, vocabulary, gradient in itertools.product(
        ("cuda", "hip"), dtypes, either, (4096, 2**18), either
    ):
        case = f"{dtype}{' bias softcap' * extras}{' dlogits' * gradient} V={vocabulary}"
        yield from record(case, functools.partial(_launch_all, dtype, extras, vocabulary, gradient), backend)


def _launch_all(dtype: torch.dtype, extras: bool, vocabulary: int, gradient: bool) -> None:
    """Both kernels, for tensors without memory."""
    logits, labels, losses = meta(16, vocabulary), meta(16, dtype=torch.int64), meta(16)
    bias, softcap = (meta(vocabulary, dtype=dtype), 30.0) if extras else (None, None)
    _launch(logits, bias, labels, losses, softcap, dtype if gradient else None)
