"""Soft prompt augmentation: the embedding of a placeholder token is a projection of its item's embedding."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rellax.errors import InputError
from rellax.ops._check import bad, check_count, is_floating, is_token
from rellax.ops.soft_prompt import soft_prompt


class SoftPrompt(nn.Module):
    """Writes a prompt's embeddings: word rows, and soft rows Linear(E → d) · GELU · Linear(d → d) (ReLLaX).

    Args:
        item_embeddings: (N, E), the recommendation model's frozen item table; kept and saved as a buffer.
        hidden_size: d of the language model.
        placeholder_ids: token ids that stand for an item; they need not be in the vocabulary.

    Raises:
        InputError: no floating matrix, no size above 0, or no distinct token ids.
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
        check_item_embeddings(item_embeddings)
        check_count("hidden_size", hidden_size)
        tokens = check_placeholder_ids(placeholder_ids)
        self.register_buffer("item_embeddings", item_embeddings.detach().clone().to(device, dtype))
        self.register_buffer("placeholder_ids", torch.tensor(tokens, device=device), persistent=False)
        self.projector = nn.Sequential(
            nn.Linear(item_embeddings.shape[1], hidden_size, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype),
        )
        self._arrivals = _Arrivals()
        self._table: tuple[Tensor, list[tuple[Tensor, int]]] | None = None

    def forward(
        self, input_ids: Tensor, item_ids: Tensor, word_embeddings: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """The embeddings (B, L, d) of a prompt; a row's k-th placeholder takes the k-th id of its `item_ids`.

        Each distinct item is projected once. On a GPU, how many a batch has is not known without waiting:
        there every entry of `item_ids` is projected, or each of the N items where these are fewer.

        Args:
            input_ids: (B, L); a packed batch is one row.
            item_ids: (B, K) ids in [0, N), padded with -1 at the end of a row; a packed batch is one row.
            word_embeddings: (V, d).
            scale: (), what the model multiplies its word embeddings by; soft rows are not scaled.

        Raises:
            InputError: a row's numbers of placeholders and of ids differ, or an id is not in [0, N). A GPU's
                values are looked at when they have arrived, in a later call. Under ``torch.compile`` and in a
                CUDA graph they are not. Till then, or for good, a placeholder without an item has NaN for
                its embedding; on a CPU it is an error of the operator.
        """
        rows, index = self.locate(input_ids, item_ids)
        return soft_prompt(input_ids, word_embeddings, rows, index, word_scale=scale)

    def locate(self, input_ids: Tensor, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The soft rows (S, d) of a prompt, and which of them each token takes: (B, L), -1 for a word.

        Raises:
            InputError: as `forward`.
        """
        if item_ids.dim() != 2 or item_ids.shape[0] != input_ids.shape[0] or item_ids.is_floating_point():
            raise InputError(
                f"item_ids: expected integers of shape (B = {input_ids.shape[0]}, K), "
                f"got {item_ids.dtype} {tuple(item_ids.shape)}"
            )
        placeholder = self.is_placeholder(input_ids)
        if not torch.compiler.is_compiling():
            self._check(placeholder, item_ids)
        rows, row_of_item = self._project(item_ids.long())
        # A column after the last stands for all items that a row of the batch should have and has not.
        row_of_item = F.pad(row_of_item, (0, 1), value=rows.shape[0])
        nth = (placeholder.cumsum(1) - 1).clamp(0, item_ids.shape[1])
        return rows, row_of_item.gather(1, nth).where(placeholder, -1)

    def is_placeholder(self, input_ids: Tensor) -> Tensor:
        """Boolean mask of the placeholder tokens, in the shape of `input_ids`."""
        return torch.isin(input_ids, self.placeholder_ids)

    @torch.inference_mode(False)
    @torch.no_grad()
    def cache_table(self) -> None:
        """Project all N items once; forward reads this table (N, d) while gradients are off.

        It is dropped when training resumes and when a weight or an item embedding changes, though not by
        writing to its ``.data``, of which PyTorch keeps no count; until then another call does nothing.
        ``torch.compile`` makes no use of it.
        """
        if self._cached_table() is not None:
            return
        if any(version < 0 for _, version in self._versions()):
            self._apply(torch.clone)  # out of inference mode
        self._table = self._rows(self.item_embeddings), self._versions()

    def train(self, mode: bool = True) -> SoftPrompt:
        if mode:
            self._table = None
        return super().train(mode)

    def _versions(self) -> list[tuple[Tensor, int]]:
        """What the table is made of; -1: an inference tensor, of which no version is counted."""
        tensors = (*self.projector.parameters(), self.item_embeddings)
        return [(tensor, -1 if tensor.is_inference() else tensor._version) for tensor in tensors]

    def _cached_table(self) -> Tensor | None:
        cached = self._table
        if cached is None:
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.projector.parameters()):
            return None
        table, versions = cached
        pairs = zip(versions, self._versions(), strict=True)
        if all(old is new and was == now for (old, was), (new, now) in pairs):
            return table
        self._table = None
        return None

    def _project(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Soft rows (S, d), and which of them each id takes: S, which does not exist, where it is no item."""
        items = self.item_embeddings.shape[0]
        known = (item_ids >= 0) & (item_ids < items)
        compiling = torch.compiler.is_compiling()  # then it cannot be told whether a table is stale
        if not compiling and (table := self._cached_table()) is not None:
            rows, row_of_item = table, item_ids
        elif not compiling and item_ids.device.type == "cpu":
            distinct, inverse = item_ids[known].unique(return_inverse=True)
            rows = self._rows(self.item_embeddings[distinct])
            row_of_item = torch.zeros_like(item_ids).masked_scatter(known, inverse)
        elif items <= item_ids.numel():
            rows, row_of_item = self._rows(self.item_embeddings), item_ids
        else:
            rows = self._rows(self.item_embeddings[item_ids.flatten().clamp(0, items - 1)])
            row_of_item = torch.arange(item_ids.numel(), device=item_ids.device).view_as(item_ids)
        return rows, row_of_item.where(known, rows.shape[0])

    def _rows(self, embeddings: Tensor) -> Tensor:
        rows: Tensor = self.projector(embeddings.to(next(self.projector.parameters()).dtype))
        return rows

    def _check(self, placeholder: Tensor, item_ids: Tensor) -> None:
        """Raise unless ids fit the placeholders: in this batch, or in one whose values have arrived."""
        sent = torch.cat([placeholder.sum(1, keepdim=True), item_ids], 1)
        for values in self._arrivals.exchange(sent):
            if problem := _problem(values[:, 0], values[:, 1:], self.item_embeddings.shape[0]):
                raise InputError(f"item_ids: {problem}" + ("" if values is sent else ", in an earlier batch"))


def check_item_embeddings(table: Any) -> None:
    """Raise unless `table` is a matrix of floating numbers."""
    if not is_floating(table) or table.dim() != 2:
        shown = table if isinstance(table, (Tensor, np.ndarray)) else type(table).__name__
        raise bad("item_embeddings", "a floating tensor of shape (N, E)", shown)


def check_placeholder_ids(ids: Any) -> tuple[int, ...]:
    """The tokens as integers of Python; an InputError for what is none, or the same twice."""
    listed = isinstance(ids, Sequence) and not isinstance(ids, str) and all(map(is_token, ids))
    if not listed or not ids or len(set(ids)) < len(ids):
        raise bad("placeholder_ids", "distinct token ids", repr(ids))
    return tuple(map(int, ids))


class _Arrivals(threading.local):
    """A GPU's small tensors, handed to the thread that sent them when they have arrived: none waits."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def exchange(self, values: Tensor) -> list[Tensor]:
        """Send `values` to the host; return what has arrived there. Not on CUDA: `values` itself, if any."""
        if values.is_meta:
            return []
        if values.device.type != "cuda":
            return [values]
        if torch.cuda.is_current_stream_capturing():
            return []
        arrived = []
        while self._pending and self._pending[0][1].query():
            arrived.append(self._pending.popleft()[0])
        copied = torch.cuda.Event()
        self._pending.append((values.to("cpu", non_blocking=True), copied))
        copied.record(torch.cuda.current_stream(values.device))
        return arrived

    def __reduce__(self) -> tuple[type[_Arrivals], tuple[()]]:
        """A copy of a module waits for nothing of the original's."""
        return _Arrivals, ()


def _problem(placeholders: Tensor, item_ids: Tensor, items: int) -> str | None:
    """What is wrong with the ids (B, K) of rows with so many placeholders (B,), as 'expected …, got …'."""
    given = item_ids >= 0
    unknown = (item_ids < -1) | (item_ids >= items)
    wrong = placeholders != given.sum(1)
    first = torch.arange(item_ids.shape[1], device=item_ids.device) < placeholders[:, None]
    if not (wrong.any() or (unknown | (given != first)).any()):
        return None
    if wrong.any():
        row = int(wrong.nonzero()[0])
        expected = f"{int(placeholders[row])} ids in row {row}, one for each placeholder of that row"
        return f"expected {expected}, got {int(given[row].sum())}"
    if unknown.any():
        return f"expected ids in [0, {items}), padded with -1, got {int(item_ids[unknown][0])}"
    return "expected -1 at the end of a row only, got it before an id"
