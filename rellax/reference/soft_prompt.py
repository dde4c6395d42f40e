"""The soft prompt in plain PyTorch: the specification of ``rellax::soft_prompt``.

    y_t = soft_rows[soft_index_t] where soft_index_t >= 0, else word_scale · word_embeddings[input_ids_t]

y is in the dtype of the word table, to which soft rows and the scale are rounded.
"""

from __future__ import annotations

from torch import Tensor

from rellax.reference._numerics import sum_rows


def soft_prompt_fwd(
    word_embeddings: Tensor,
    soft_rows: Tensor,
    input_ids: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None,
) -> Tensor:
    """(…, d) in the word table's dtype; the scale, rounded to it, is 1 where it is None."""
    soft = soft_index >= 0
    y = word_embeddings[input_ids.masked_fill(soft, 0)]
    if word_scale is not None:
        y *= word_scale.to(y.dtype)
    y[soft] = soft_rows[soft_index[soft]].to(y.dtype)
    return y


def soft_prompt_bwd(
    dy: Tensor,
    word_embeddings: Tensor | None,
    soft_rows: Tensor | None,
    input_ids: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(d word_embeddings, d soft_rows); a table that wants no gradient is None, and its gradient empty."""
    dwords, dsoft = (dy.new_empty(0) for _ in range(2))
    soft = soft_index >= 0
    if word_embeddings is not None:
        sums = sum_rows(dy[~soft], input_ids[~soft], word_embeddings.shape[0])
        if word_scale is not None:
            sums *= word_scale.to(dy.dtype)
        dwords = sums.to(word_embeddings.dtype)
    if soft_rows is not None:
        dsoft = sum_rows(dy[soft], soft_index[soft], soft_rows.shape[0]).to(soft_rows.dtype)
    return dwords, dsoft
