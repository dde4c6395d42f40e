"""From prompts to tensors: examples, the order in which they are seen, and the batches of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

_POOL = 8  # batches sorted by length together


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        sample: row of the sample in its table and in the instance embeddings.
        label: 1 for Yes, 0 for No; read in training alone.
        input_ids: the prompt's tokens, up to where the answer begins.
        item_ids: dense item of each placeholder, in order; empty without soft prompts.
    """

    sample: int
    label: int
    input_ids: Sequence[int]
    item_ids: Sequence[int]


@dataclass(frozen=True)
class Collator:
    """Makes batches for a patched model: padded on the right, or packed.

    Attributes:
        pad_id: token to pad with.
        answer_ids: tokens of (No, Yes).
        instance_embeddings: (n, d_u) float32, a row per sample; None for a model without gates.
        base_probabilities: (n,) float32, whose log-odds the answers begin from; None where they do from 0.
        soft_prompt: whether the model takes item ids.
        packed: put the prompts of a batch one after another, without padding.
    """

    pad_id: int
    answer_ids: tuple[int, int]
    instance_embeddings: Tensor | None = None
    base_probabilities: Tensor | None = None
    soft_prompt: bool = False
    packed: bool = False

    def prompts(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch to predict.

        Padded: input_ids and attention_mask (B, L); where the model takes them also item_ids (B, K), padded
        with -1, instance_embed (B, d_u) and base_logit (B,). Packed: input_ids and position_ids (1, T),
        cu_seqlens (B + 1,) int32, max_seqlen, an int; item_ids is (1, n).
        """
        return self._batch(examples, [example.input_ids for example in examples])

    def supervised(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch to train on: each prompt ends in its answer, the only token that `labels` has.

        `labels` are of input_ids' shape; `answer_positions` (B,) are the tokens before the answers.
        """
        answers = [self.answer_ids[example.label] for example in examples]
        rows = [[*example.input_ids, answer] for example, answer in zip(examples, answers, strict=True)]
        batch = self._batch(examples, rows)
        lengths = torch.tensor([len(row) for row in rows])
        length = batch["input_ids"].shape[1]
        ends = lengths.cumsum(0) if self.packed else torch.arange(len(rows)) * length + lengths
        labels = torch.full_like(batch["input_ids"], -100)
        labels.view(-1)[ends - 1] = torch.tensor(answers)
        return batch | {"labels": labels, "answer_positions": ends - 2}

    def _batch(self, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        items = [example.item_ids for example in examples]
        samples = [example.sample for example in examples]
        batch: dict[str, Any]
        if self.packed:
            lengths = [len(row) for row in rows]
            batch = {
                "input_ids": _joined(rows),
                "position_ids": _joined([range(length) for length in lengths]),
                "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
                "max_seqlen": max(lengths),
            }
        else:
            batch = {
                "input_ids": _padded(rows, self.pad_id),
                "attention_mask": _padded([[1] * len(row) for row in rows], 0),
            }
        if self.soft_prompt:
            batch["item_ids"] = _joined(items) if self.packed else _padded(items, -1)
        if self.instance_embeddings is not None:
            batch["instance_embed"] = self.instance_embeddings[samples]
        if self.base_probabilities is not None:
            batch["base_logit"] = log_odds(self.base_probabilities[samples])
        return batch


def log_odds(probabilities: Tensor) -> Tensor:
    """The log-odds of probabilities, of which fp32 rounds some to 0 or 1: finite all the same."""
    return probabilities.logit(eps=1e-7)


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class EpochBatches(Sequence[np.ndarray]):
    """The batches of an epoch: of `count` rows, each once, random, but of similar length within a batch.

    Only neighbours in a random order are sorted by length, so that a batch stays a mixture. A pure function
    of the arguments: a run that resumes sees the same batches. Lengths are asked for when a batch is, so what
    is held is 4 bytes a row.

    Args:
        lengths: the lengths (n,) of any rows (n,).
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        lengths: Callable[[np.ndarray], np.ndarray],
        *,
        seed: int,
        epoch: int,
    ) -> None:
        rng = np.random.default_rng((seed, epoch))
        self.batch_size, self.lengths = batch_size, lengths
        self.rows = rng.permutation(np.arange(count, dtype=np.int32))
        self.order = rng.permutation(-(-count // batch_size))

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, place = divmod(int(self.order[index]), _POOL)
        pool = self.rows[number * _POOL * self.batch_size :][: _POOL * self.batch_size]
        pool = pool[np.argsort(self.lengths(pool), kind="stable")]
        return _cut(pool, self.batch_size)[place]


def scoring_batches(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Batches for prediction: longest prompts first, so that too large a batch fails at once."""
    return _cut(np.argsort(-np.asarray(lengths), kind="stable"), batch_size)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _joined(rows: Sequence[Sequence[int]]) -> Tensor:
    """(1, T) int64, the rows one after another."""
    return torch.tensor([list(itertools.chain.from_iterable(rows))], dtype=torch.int64)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    batch = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for row, ids in zip(batch, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return batch
