"""Batches: every row once, in an order that the seed gives, padded so that nothing changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rellax.ctr.batches import Collator, EpochBatches, Example, scoring_batches

LENGTHS = np.random.default_rng(0).integers(5, 200, size=157)
EXAMPLES = [Example(4, 1, [5, 6, 7], [2, 9]), Example(0, 0, [8], [3]), Example(2, 1, [9, 10], [])]


def epoch_batches(batch_size: int, *, seed: int, epoch: int) -> EpochBatches:
    return EpochBatches(len(LENGTHS), batch_size, LENGTHS.__getitem__, seed=seed, epoch=epoch)


def test_epoch_is_a_permutation_that_seed_and_epoch_give() -> None:
    batches = epoch_batches(8, seed=1, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(157))
    assert sorted(map(len, batches)) == [5] + [8] * 19
    assert len(batches) == -(-157 // 8)
    again, other_epoch, other_seed = (
        np.concatenate(epoch_batches(8, seed=seed, epoch=epoch)) for seed, epoch in ((1, 2), (1, 3), (2, 2))
    )
    assert np.array_equal(np.concatenate(batches), again)
    assert not np.array_equal(again, other_epoch)
    assert not np.array_equal(again, other_seed)


def test_batches_hold_similar_lengths_in_random_order() -> None:
    batches = epoch_batches(8, seed=0, epoch=0)
    spread = np.mean([np.ptp(LENGTHS[batch]) for batch in batches])
    unsorted = np.mean([np.ptp(LENGTHS[i : i + 8]) for i in range(0, 157, 8)])
    assert spread < unsorted / 3
    means = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.6


def test_scoring_starts_with_the_longest() -> None:
    batches = scoring_batches(LENGTHS, 16)
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(157))
    assert np.all(np.diff(LENGTHS[order]) <= 0)


def test_prompts_are_padded_on_the_right() -> None:
    embeddings = torch.arange(10.0).view(5, 2)
    batch = Collator(0, (11, 12), embeddings, soft_prompt=True).prompts(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["item_ids"].tolist() == [[2, 9], [3, -1], [-1, -1]]
    assert batch["instance_embed"].tolist() == [[8.0, 9.0], [0.0, 1.0], [4.0, 5.0]]
    assert set(batch) == {"input_ids", "attention_mask", "item_ids", "instance_embed"}


def test_only_the_answer_is_supervised() -> None:
    batch = Collator(0, (11, 12)).supervised(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 12], [8, 11, 0, 0], [9, 10, 12, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 12],
        [-100, 11, -100, -100],
        [-100, -100, 12, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["answer_positions"].tolist() == [2, 4, 9]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "answer_positions"}


def test_packed_prompts_follow_one_another() -> None:
    embeddings = torch.arange(10.0).view(5, 2)
    batch = Collator(0, (11, 12), embeddings, soft_prompt=True, packed=True).prompts(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["max_seqlen"] == 3
    assert batch["item_ids"].tolist() == [[2, 9, 3]]
    assert batch["instance_embed"].tolist() == [[8.0, 9.0], [0.0, 1.0], [4.0, 5.0]]
    names = {"input_ids", "position_ids", "cu_seqlens", "max_seqlen", "item_ids", "instance_embed"}
    assert set(batch) == names


def test_packed_answers_end_their_prompts() -> None:
    batch = Collator(0, (11, 12), packed=True).supervised(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 12, 8, 11, 9, 10, 12]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 12, -100, 11, -100, -100, 12]]
    assert batch["answer_positions"].tolist() == [2, 4, 7]
    assert batch["cu_seqlens"].tolist() == [0, 4, 6, 9]
    assert batch["max_seqlen"] == 4


@pytest.mark.parametrize("packed", [False, True])
def test_answers_begin_from_log_odds(packed: bool) -> None:
    examples = [Example(sample, 1, [5, 6], ()) for sample in (2, 0, 3, 1)]
    known = torch.tensor([0.0, 0.25, 0.5, 1.0])
    batch = Collator(0, (1, 2), base_probabilities=known, packed=packed).prompts(examples)
    assert batch["base_logit"].tolist() == pytest.approx([0.0, -16.1, 15.9, -math.log(3)], abs=0.1)
