"""Soft prompt augmentation: the embedding of a placeholder token is a projection of its item's embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rellax.errors import InputError
from rellax.ops.soft_prompt import soft_prompt


class SoftPrompt(nn.Module):
    """Writes a prompt's embeddings: word rows, and soft rows Linear(E → d) · GELU · Linear(d → d) (ReLLaX).

    Args:
        item_embeddings: (N, E), the recommendation model's frozen item table; kept and saved as a buffer.
        hidden_size: d of the language model.
        placeholder_ids: token ids that stand for an item; they need not be in the vocabulary.
    """

    item_embeddings: Tensor
    placeholder_ids: Tensor

    def __init__(
        self,
        item_embeddings: Tensor,
        hidden_size: int,
        placeholder_ids: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("item_embeddings", item_embeddings.detach().clone().to(device, dtype))
        self.register_buffer(
            "placeholder_ids", torch.tensor(placeholder_ids, device=device), persistent=False
        )
        self.projector = nn.Sequential(
            nn.Linear(item_embeddings.shape[1], hidden_size, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype),
        )
        self._table: Tensor | None = None
        self._table_of: list[tuple[Tensor, int]] = []

    def forward(
        self, input_ids: Tensor, item_ids: Tensor, word_embeddings: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """The embeddings (B, L, d) of a prompt; a row's k-th placeholder takes the k-th id of its `item_ids`.

        Args:
            input_ids: (B, L); a packed batch is one row.
            item_ids: (B, K) ids in [0, N), padded with -1 at the end of a row; a packed batch is one row.
            word_embeddings: (V, d), frozen.
            scale: (), what the model multiplies its word embeddings by; soft rows are not scaled.

        Raises:
            InputError: a row's numbers of placeholders and of ids differ, or an id is not in [0, N). Values
                are not looked at under ``torch.compile``.
        """
        if item_ids.dim() != 2 or item_ids.shape[0] != input_ids.shape[0] or item_ids.is_floating_point():
            raise InputError(
                f"item_ids: expected integers of shape (B = {input_ids.shape[0]}, K), "
                f"got {item_ids.dtype} {tuple(item_ids.shape)}"
            )
        placeholder = self.is_placeholder(input_ids)
        if not torch.compiler.is_compiling():
            self._check(placeholder, item_ids)
        rows, row_of_item = self._project(item_ids)
        nth = placeholder.cumsum(1)  # 1 at a row's first placeholder, hence the column in front
        index = F.pad(row_of_item, (1, 0), value=-1).gather(1, nth).where(placeholder, -1)
        embeds = soft_prompt(input_ids, word_embeddings, rows, index)
        if scale is None:
            return embeds
        return embeds * torch.where(index < 0, scale.to(embeds.dtype), 1).unsqueeze(-1)

    def is_placeholder(self, input_ids: Tensor) -> Tensor:
        """Boolean mask of the placeholder tokens, in the shape of `input_ids`."""
        return torch.isin(input_ids, self.placeholder_ids)

    @torch.no_grad()
    def cache_table(self) -> None:
        """Project all N items once; forward reads this table (N, d) while gradients are off.

        It is dropped when training resumes and when a weight or an item embedding changes. ``torch.compile``
        makes no use of it.
        """
        self._table = self._rows(self.item_embeddings)
        self._table_of = self._versions()

    def train(self, mode: bool = True) -> SoftPrompt:
        if mode:
            self._drop_table()
        return super().train(mode)

    def _drop_table(self) -> None:
        self._table, self._table_of = None, []

    def _versions(self) -> list[tuple[Tensor, int]]:
        return [(tensor, tensor._version) for tensor in (*self.projector.parameters(), self.item_embeddings)]

    def _cached_table(self) -> Tensor | None:
        if self._table is None:
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.projector.parameters()):
            return None
        pairs = zip(self._table_of, self._versions(), strict=True)
        if not all(old is new and was == now for (old, was), (new, now) in pairs):
            self._drop_table()
        return self._table

    def _project(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Soft rows (S, d), and which of them each entry of `item_ids` takes; each item is projected once."""
        items = item_ids.long().clamp(min=0)
        if torch.compiler.is_compiling():
            # How many items are distinct is not known while tracing, nor whether a weight has changed.
            row_of_item = torch.arange(items.numel(), device=items.device).view_as(items)
            return self._rows(self.item_embeddings[items.flatten()]), row_of_item
        if (table := self._cached_table()) is not None:
            return table, items
        distinct, row_of_item = items.unique(return_inverse=True)
        return self._rows(self.item_embeddings[distinct]), row_of_item

    def _rows(self, embeddings: Tensor) -> Tensor:
        rows: Tensor = self.projector(embeddings.to(next(self.projector.parameters()).dtype))
        return rows

    def _check(self, placeholder: Tensor, item_ids: Tensor) -> None:
        """Raise unless the ids fit the placeholders; a device is waited for once."""
        given, items = item_ids >= 0, len(self.item_embeddings)
        wrong = placeholder.sum(1) != given.sum(1)
        gaps = given.int().diff(dim=1) > 0
        unknown = (item_ids < -1) | (item_ids >= items)
        if not (wrong.any() | gaps.any() | unknown.any()):
            return
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise InputError(
                f"item_ids: row {row} of input_ids has {int(placeholder[row].sum())} placeholders, "
                f"row {row} of item_ids has {int(given[row].sum())} ids"
            )
        if gaps.any():
            raise InputError("item_ids: expected -1 at the end of a row only, got it before an id")
        got = int(item_ids[unknown][0])
        raise InputError(f"item_ids: expected ids in [0, {items}), padded with -1, got {got}")
