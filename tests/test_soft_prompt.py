"""``rellax::soft_prompt`` against an embedding lookup and masked_scatter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import soft_prompt
from rellax.testing import oracle
from rellax.testing.cases import DTYPES, SOFT_PROMPT
from rellax.testing.cases import soft_prompt as inputs_of


def naive(input_ids: Tensor, word_embeddings: Tensor, soft_rows: Tensor, soft_index: Tensor) -> Tensor:
    soft = soft_index >= 0
    words = F.embedding(torch.where(soft, 0, input_ids), word_embeddings)
    taken = soft_rows[soft_index[soft]].to(words.dtype)
    return words.masked_scatter(soft[..., None], taken)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOFT_PROMPT)
def test_equals_masked_scatter(case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype, **SOFT_PROMPT[case])
    oracle.check(soft_prompt, naive, inputs, dtype)
    assert torch.equal(soft_prompt(**inputs), naive(**inputs))


def test_gradients_in_fp64() -> None:
    inputs = inputs_of(torch.float64)
    ids, words, rows, index = inputs.values()
    assert torch.autograd.gradcheck(lambda words, rows: soft_prompt(ids, words, rows, index), (words, rows))


def test_ids_at_soft_positions_are_never_looked_up() -> None:
    words, rows = torch.zeros(3, 2), torch.tensor([[5.0, 6.0]])
    ids = torch.tensor([0, 3, -1, 2**62, 2])
    y = soft_prompt(ids, words, rows, torch.tensor([-1, 0, 0, 0, -1]))
    assert y.tolist() == [[0, 0], [5, 6], [5, 6], [5, 6], [0, 0]]


def test_frozen_words_are_not_saved_and_get_no_gradient() -> None:
    inputs = inputs_of(torch.float32, train_words=False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        y = soft_prompt(**inputs)
    assert all(tensor.data_ptr() != inputs["word_embeddings"].data_ptr() for tensor in saved)
    y.sum().backward()
    assert inputs["word_embeddings"].grad is None
    counts = torch.bincount(inputs["soft_index"][inputs["soft_index"] >= 0], minlength=5)
    assert torch.equal(inputs["soft_rows"].grad, counts[:, None].expand(5, 9).to(torch.float32))


def test_gradient_of_a_row_taken_often_is_summed_in_fp32() -> None:
    """In bf16 256 + 1 is 256: a sum of ones would stop there."""
    rows = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(1000, dtype=torch.int64)
    soft_prompt(index, torch.zeros(1, 2, dtype=torch.bfloat16), rows, index).sum().backward()
    assert rows.grad.tolist() == [[1000.0, 1000.0]]


def test_same_bits_every_time() -> None:
    inputs = inputs_of(torch.float32, shape=(64, 129), rows=3, d=65)
    upstream = torch.randn(64, 129, 65).to(inputs["soft_rows"])
    leaves = [inputs["word_embeddings"], inputs["soft_rows"]]
    first, second = (torch.autograd.grad(soft_prompt(**inputs), leaves, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing() -> None:
    inputs = inputs_of(torch.float32)
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
        y = soft_prompt(**inputs)
    assert torch.equal(y, naive(**inputs))


WRONG = {
    "input_ids": torch.zeros(2, 7),
    "word_embeddings": torch.zeros(11, 9, dtype=torch.int64),
    "soft_rows": torch.zeros(5, 8),
    "soft_index": torch.zeros(2, 6, dtype=torch.int64),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name: str) -> None:
    inputs = inputs_of(torch.float32)
    inputs[name] = WRONG[name].to(inputs["input_ids"].device)
    with pytest.raises(InputError, match=f"^{name}: expected "):
        soft_prompt(**inputs)


@pytest.mark.parametrize(("name", "wrong"), [("input_ids", 11), ("input_ids", -1), ("soft_index", 5)])
def test_errors_name_the_value_on_a_cpu(name: str, wrong: int) -> None:
    inputs = {key: value.cpu() for key, value in inputs_of(torch.float32, share=0.0).items()}
    inputs[name][1, 3] = wrong
    with pytest.raises(InputError, match=f"^{name}: expected a row of .*, got {wrong}"):
        soft_prompt(**inputs)
