"""The answer head in plain PyTorch: the specification of ``rellax::answer_loss``.

    h_i = hidden[positions_i]        l_i = cap(W h_i + bias)        cap(l) = c · tanh(l / c), or l itself
    loss = Σ_i [label_i is not -100] (logsumexp l_i - l_i[label_i]) / denominator

For "choice" W and bias are only the two rows of `choice_ids`. A label that is no row makes loss and gradients
NaN: on a GPU no check reads it. Everything is computed in fp32 (fp64 where an argument is fp64). Gradients
are formed along with the loss, some rows at a time: so the (n, V) logits need neither be kept nor computed
twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rellax.reference._numerics import accumulation_dtype, sum_rows

IGNORED = -100
_LOGITS = 2**24
"""At most so many logits are held at once (64 MiB in fp32)."""
_WIDENED = 2**20
"""At most so many elements of W are widened at once: 4 MiB in fp32, which stay in a CPU's cache."""


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
    """(loss, logits, dh, dW, dbias) in fp32 or fp64; a gradient that `needs` says is not wanted is empty.

    Logits (n, 2) are those of `choice_ids`, or (n, 0). dh is (n, d); dW, dbias have V rows, for "choice" 2.
    """
    dtype = accumulation_dtype(torch.promote_types(hidden.dtype, lm_head_weight.dtype))
    rows = hidden.flatten(0, -2)[positions].to(dtype)
    two_rows = select_rows(lm_head_weight, bias, choice_ids)
    logits = head_logits(rows, *two_rows, softcap).contiguous()
    if loss == "choice":
        lm_head_weight, bias = two_rows
        labels = choices(labels, choice_ids)
    value, dh, dweight, dbias = _cross_entropy(
        rows, lm_head_weight, bias, labels, denominator, softcap, needs
    )
    return value, logits, dh, dweight, dbias


def answer_bwd(
    dloss: Tensor, dh: Tensor, positions: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """d hidden of `shape` (…, d) in `dtype`: dloss · dh at `positions`, else zero."""
    dhidden = dh.new_zeros((*shape,), dtype=dtype)
    positions, order = positions.sort()
    run = positions.diff(prepend=positions[:1]).ne(0).cumsum(0)  # of equal positions: their rows are added
    rows = sum_rows(dloss * dh[order], run, len(order)).to(dtype)
    dhidden.view(-1, shape[-1])[positions] = rows[run]
    return dhidden


def answer_head_bwd(dloss: Tensor, gradient: Tensor, choice_ids: Sequence[int], vocabulary: int) -> Tensor:
    """d head (V, …) from the gradient of its rows `choice_ids`, or of all of them where those are empty."""
    gradient = dloss * gradient
    if not choice_ids:
        return gradient
    full = gradient.new_zeros((vocabulary, *gradient.shape[1:]))
    for row, row_gradient in zip(choice_ids, gradient, strict=True):
        full[row] = row_gradient
    return full


def _cross_entropy(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    denominator: Tensor,
    softcap: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, d rows, d weight, d bias)."""
    need_rows, need_weight, need_bias = needs
    loss = rows.new_zeros(())
    drows = rows.new_zeros(rows.shape if need_rows else 0)
    dweight = rows.new_zeros(weight.shape if need_weight else 0)
    dbias = rows.new_zeros(weight.shape[0] if need_bias else 0)
    ignored = (labels == IGNORED)[:, None]
    unknown = ((labels < 0) | (labels >= weight.shape[0]))[:, None] & ~ignored
    share = (~ignored / denominator.to(rows.dtype)).masked_fill(unknown, torch.nan)
    rows, labels = rows.masked_fill(ignored, 0), labels[:, None].masked_fill(ignored | unknown, 0)
    for part in _blocks(rows.shape[0], weight.shape[0], _LOGITS):
        logits = head_logits(rows[part], weight, bias, softcap)
        lse = logits.logsumexp(1, keepdim=True)
        losses = (lse - logits.gather(1, labels[part])).masked_fill(ignored[part], 0)
        loss += (losses * share[part]).sum()
        if not any(needs):
            continue
        dlogits = (logits - lse).exp_()
        dlogits.scatter_add_(1, labels[part], -torch.ones_like(lse)).mul_(share[part])
        if softcap is not None:
            dlogits *= 1 - (logits / softcap).square()
        if need_rows:
            for block, wide in _widened(weight, rows.dtype):
                drows[part].addmm_(dlogits[:, block], wide)
        if need_weight:
            dweight.addmm_(dlogits.t(), rows[part])
        if need_bias:
            dbias += dlogits.sum(0)
    return loss, drows, dweight, dbias


def head_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """cap(rows Wᵀ + bias) in the dtype of `rows`."""
    transposed = rows.new_empty((weight.shape[0], rows.shape[0]))  # on a CPU W is better on the left
    for block, wide in _widened(weight, rows.dtype):
        torch.mm(wide, rows.t(), out=transposed[block])
    logits = transposed.t()
    if bias is not None:
        logits += bias
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def choices(labels: Tensor, choice_ids: Sequence[int]) -> Tensor:
    """Labels as rows of a head of these two: 0 No, 1 Yes, -100 ignored; any other is 2, which is no row."""
    no, yes = choice_ids
    other = torch.where(labels == IGNORED, IGNORED, 2)
    return torch.where(labels == no, 0, torch.where(labels == yes, 1, other))


def select_rows(weight: Tensor, bias: Tensor | None, tokens: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The head's rows of `tokens`: without a tensor of indices, whose copy to a GPU makes the host wait."""

    def select(table: Tensor) -> Tensor:
        return torch.cat([table[:0], *(table[token : token + 1] for token in tokens)])

    return select(weight), None if bias is None else select(bias)


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """All rows of W in `dtype`, some at a time, each time in the same memory."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    buffer: Tensor | None = None
    for block in _blocks(weight.shape[0], weight.shape[1], _WIDENED):
        part = weight[block]
        buffer = torch.empty_like(part, dtype=dtype) if buffer is None else buffer[: len(part)]
        yield block, buffer.copy_(part)


def _blocks(rows: int, columns: int, size: int) -> Iterator[slice]:
    """Cut the rows of a matrix into blocks of at most `size` elements."""
    step = max(size // max(columns, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))
