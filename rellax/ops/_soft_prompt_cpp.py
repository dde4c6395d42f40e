"""``rellax._C``'s soft prompt as implementations of ``rellax::soft_prompt`` and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rellax.kernels._host import rows_of
from rellax.ops._check import dtype_name
from rellax.ops._register import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def soft_prompt_fwd(
    word_embeddings: Tensor,
    soft_rows: Tensor,
    input_ids: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None,
) -> Tensor:
    """As ``rellax.reference.soft_prompt.soft_prompt_fwd``, for a word table of fp32, bf16 or fp16."""
    if soft_rows.dtype not in DTYPES:
        soft_rows = soft_rows.to(word_embeddings.dtype)
    words, soft = rows_of(word_embeddings), rows_of(soft_rows)
    input_ids, soft_index = input_ids.contiguous(), soft_index.contiguous()
    y = words.new_empty((*input_ids.shape, words.shape[1]))
    extension().soft_prompt(
        words=_described(words),
        soft=_described(soft),
        word_scale=_scale(word_scale, words.dtype),
        input_ids=input_ids.data_ptr(),
        soft_index=soft_index.data_ptr(),
        tokens=input_ids.numel(),
        d=words.shape[1],
        out=y.data_ptr(),
        threads=torch.get_num_threads(),
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
    """As ``rellax.reference.soft_prompt.soft_prompt_bwd``, for dy of fp32, bf16 or fp16."""
    dwords, dsoft = (dy.new_empty(0) for _ in range(2))
    rows = rows_of(dy)
    if word_embeddings is not None:
        word_index = input_ids.masked_fill(soft_index >= 0, -1)
        dwords = _sums(rows, word_index, _scale(word_scale, dy.dtype), word_embeddings)
    if soft_rows is not None:
        dsoft = _sums(rows, soft_index, 1.0, soft_rows)
    return dwords, dsoft


def _sums(rows: Tensor, index: Tensor, factor: float, table: Tensor) -> Tensor:
    """In the shape and dtype of `table`: row i is factor times the sum of all rows whose index is i."""
    index = index.contiguous()
    sums = table.new_empty(table.shape, dtype=table.dtype if table.dtype in DTYPES else torch.float32)
    extension().row_sums(
        rows=_described(rows),
        index=index.data_ptr(),
        factor=factor,
        d=rows.shape[1],
        count=sums.shape[0],
        dtype=dtype_name(sums.dtype),
        out=sums.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return sums.to(table.dtype)


def _described(rows: Tensor) -> Any:
    return extension().Rows(
        data=rows.data_ptr(), dtype=dtype_name(rows.dtype), count=rows.shape[0], stride=rows.stride(0)
    )


def _scale(scale: Tensor | None, dtype: torch.dtype) -> float:
    return 1.0 if scale is None else float(scale.to(dtype))
