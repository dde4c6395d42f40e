"""The soft prompt on a GPU: each embedding is read and written once, and each soft row's gradient too.

    forward     one program for each token and block of columns
    backward    occurrences  lists, for each soft row, the tokens that took it, in whatever order
                row sums     one program for each soft row and block of columns adds up the gradients of its
                             tokens, in order

A row that was taken more often than its list is long has its tokens looked for among all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rellax.kernels._build import Build, meta, record
from rellax.kernels._host import cdiv, rows_of
from rellax.kernels._tuning import Tuned

# What a program takes of a row: 64 bytes for each thread.
_ROW = Tuned("soft_prompt", {"bytes": 4096, "num_warps": 2})
_CAPACITY = 16  # of a soft row's list of tokens
_WINDOW = 1024  # tokens that are compared with a soft row at once
_COUNTED = 512  # tokens of a program that lists them


@triton.jit
def _soft_prompt_fwd_kernel(
    words_ptr,
    soft_ptr,
    input_ids_ptr,
    soft_index_ptr,
    scale_ptr,
    y_ptr,
    d,
    vocabulary,
    soft_rows,
    stride_words,
    stride_soft,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    word, soft = tl.load(input_ids_ptr + token), tl.load(soft_index_ptr + token)
    dtype = y_ptr.dtype.element_ty
    if soft >= 0:
        known = (soft < soft_rows) & (column < d)
        y = tl.load(soft_ptr + soft * stride_soft + column, mask=known, other=float("nan")).to(dtype)
    else:
        known = (word >= 0) & (word < vocabulary) & (column < d)
        y = tl.load(words_ptr + word * stride_words + column, mask=known, other=float("nan"))
        if scale_ptr is not None:
            y = (y.to(tl.float32) * tl.load(scale_ptr).to(dtype).to(tl.float32)).to(dtype)
    tl.store(y_ptr + token * d + column, y, mask=column < d)


@triton.jit
def _occurrences_kernel(
    index_ptr, count_ptr, occurrences_ptr, tokens, rows, CAPACITY: tl.constexpr, BLOCK_T: tl.constexpr
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.load(index_ptr + token, mask=token < tokens, other=-1)
    known = (row >= 0) & (row < rows)
    place = tl.atomic_add(count_ptr + row, 1, mask=known, sem="relaxed")
    tl.store(occurrences_ptr + row * CAPACITY + place, token, mask=known & (place < CAPACITY))


@triton.jit
def _add_in_order(sums, dy_ptr, candidate, tokens, stride, column, d):
    """sums plus the rows of dy of all candidates below `tokens`, from the first to the last."""
    token = tl.min(candidate)
    while token < tokens:
        row = tl.load(dy_ptr + token.to(tl.int64) * stride + column, mask=column < d, other=0.0)
        sums += row.to(tl.float32)
        token = tl.min(tl.where(candidate > token, candidate, tokens))
    return sums


@triton.jit
def _row_sums_kernel(
    dy_ptr,
    index_ptr,
    count_ptr,
    occurrences_ptr,
    out_ptr,
    tokens,
    d,
    stride_dy,
    CAPACITY: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.load(count_ptr + row)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    if count <= CAPACITY:
        place = tl.arange(0, CAPACITY)
        candidate = tl.load(occurrences_ptr + row * CAPACITY + place, mask=place < count, other=tokens)
        sums = _add_in_order(sums, dy_ptr, candidate, tokens, stride_dy, column, d)
    else:
        start = 0
        while start < tokens:
            token = start + tl.arange(0, WINDOW)
            taken = tl.load(index_ptr + token, mask=token < tokens, other=-1) == row
            candidate = tl.where(taken, token, tokens)
            sums = _add_in_order(sums, dy_ptr, candidate, tokens, stride_dy, column, d)
            start += WINDOW
    tl.store(out_ptr + row * d + column, sums, mask=column < d)


def soft_prompt_fwd(
    word_embeddings: Tensor,
    soft_rows: Tensor,
    input_ids: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None,
) -> Tensor:
    """As ``rellax.reference.soft_prompt.soft_prompt_fwd``."""
    words, soft = rows_of(word_embeddings), rows_of(soft_rows)
    tokens, d = input_ids.numel(), words.shape[1]
    y = words.new_empty((*input_ids.shape, d))
    if y.numel() == 0:
        return y
    row = _ROW.on(y.device)
    block = row["bytes"] // words.element_size()
    with torch.cuda.device_of(y):
        _soft_prompt_fwd_kernel[(tokens, cdiv(d, block))](
            words,
            soft,
            input_ids.contiguous(),
            soft_index.contiguous(),
            word_scale,
            y,
            d,
            words.shape[0],
            soft.shape[0],
            words.stride(0),
            soft.stride(0),
            BLOCK_D=block,
            num_warps=row["num_warps"],
        )
    return y


def soft_prompt_bwd(
    dy: Tensor,
    word_embeddings: Tensor | None,
    soft_rows: Tensor | None,
    input_ids: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``rellax.reference.soft_prompt.soft_prompt_bwd``."""
    dwords, dsoft = (dy.new_empty(0) for _ in range(2))
    rows = rows_of(dy)
    if word_embeddings is not None:
        vocabulary = word_embeddings.shape[0]
        known = (soft_index < 0) & (input_ids >= 0) & (input_ids < vocabulary)
        words = input_ids.where(known, -1).flatten()
        sums = torch.ops.aten.embedding_dense_backward(rows.float(), words, vocabulary, -1, False)
        if word_scale is not None:
            sums *= word_scale.to(dy.dtype)
        dwords = sums.to(word_embeddings.dtype)
    if soft_rows is not None:
        dsoft = _row_sums(rows, soft_index.flatten().contiguous(), soft_rows)
    return dwords, dsoft


def _row_sums(rows: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """In the shape and dtype of `table`: row i is the sum of all rows whose index is i."""
    tokens, (count, d) = len(rows), table.shape
    sums = table.new_empty((count, d))
    if sums.numel() == 0:
        return sums
    counts = torch.zeros(count, dtype=torch.int32, device=rows.device)
    occurrences = torch.empty((count, _CAPACITY), dtype=torch.int32, device=rows.device)
    row = _ROW.on(rows.device)
    block = row["bytes"] // rows.element_size()
    with torch.cuda.device_of(rows):
        if tokens:
            _occurrences_kernel[(cdiv(tokens, _COUNTED),)](
                index, counts, occurrences, tokens, count, CAPACITY=_CAPACITY, BLOCK_T=_COUNTED
            )
        _row_sums_kernel[(count, cdiv(d, block))](
            rows,
            index,
            counts,
            occurrences,
            sums,
            tokens,
            d,
            rows.stride(0),
            CAPACITY=_CAPACITY,
            WINDOW=_WINDOW,
            BLOCK_D=block,
            num_warps=row["num_warps"],
        )
    return sums


def builds() -> Iterator[Build]:
    """For each pair of dtypes, and with the words as they are and scaled."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for backend, words, soft, scaled in itertools.product(("cuda", "hip"), dtypes, dtypes, (False, True)):
        case = f"{words}, soft rows {soft}{', scaled' * scaled}"
        yield from record(case, functools.partial(_launch_all, words, soft, scaled), backend)


def _launch_all(words: torch.dtype, soft: torch.dtype, scaled: bool) -> None:
    """Every kernel, forward and backward, for tensors without memory."""
    word_embeddings, soft_rows = meta(2**17, 4096, dtype=words), meta(256, 4096, dtype=soft)
    ids, scale = meta(4096, dtype=torch.int64), meta() if scaled else None
    y = soft_prompt_fwd(word_embeddings, soft_rows, ids, ids, scale)
    soft_prompt_bwd(y, None, soft_rows, ids, ids, scale)
