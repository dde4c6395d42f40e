"""The soft prompt in plain PyTorch: the specification of ``rellax::soft_prompt``.

y_t = soft_rows[soft_index_t] where soft_index_t >= 0, else word_embeddings[input_ids_t]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rellax.reference._numerics import sum_rows


def soft_prompt_fwd(
    input_ids: Tensor, word_embeddings: Tensor, soft_rows: Tensor, soft_index: Tensor
) -> Tensor:
    """(…, d) in the word table's dtype."""
    soft = soft_index >= 0
    y = F.embedding(input_ids.masked_fill(soft, 0), word_embeddings)
    y[soft] = soft_rows[soft_index[soft]].to(y.dtype)
    return y


def soft_prompt_bwd(
    dy: Tensor,
    input_ids: Tensor,
    word_embeddings: Tensor | None,
    soft_rows: Tensor | None,
    soft_index: Tensor,
) -> tuple[Tensor, Tensor]:
    """(d word_embeddings, d soft_rows); a table that wants no gradient is None, and its gradient empty."""
    dwords, dsoft = (dy.new_empty(0) for _ in range(2))
    soft = soft_index >= 0
    if word_embeddings is not None:
        dwords = sum_rows(dy[~soft], input_ids[~soft], word_embeddings.shape[0]).to(word_embeddings.dtype)
    if soft_rows is not None:
        dsoft = sum_rows(dy[soft], soft_index[soft], soft_rows.shape[0]).to(soft_rows.dtype)
    return dwords, dsoft
