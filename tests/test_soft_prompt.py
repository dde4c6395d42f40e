"""``rellax::soft_prompt`` against an embedding lookup and masked_scatter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import soft_prompt
from rellax.testing import oracle
from rellax.testing.cases import DTYPES, SOFT_PROMPT, device
from rellax.testing.cases import soft_prompt as inputs_of


def naive(
    input_ids: Tensor,
    word_embeddings: Tensor,
    soft_rows: Tensor,
    soft_index: Tensor,
    word_scale: Tensor | None = None,
) -> Tensor:
    soft = soft_index >= 0
    words = F.embedding(torch.where(soft, 0, input_ids), word_embeddings)
    if word_scale is not None:
        words = words * word_scale.to(words.dtype)
    taken = soft_rows[soft_index[soft]].to(words.dtype)
    return words.masked_scatter(soft[..., None], taken)


def gradients(inputs: dict[str, Any], dy: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of the words and the soft rows."""
    y = soft_prompt(**inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if dy is None else dy
    return torch.autograd.grad(y, [inputs["word_embeddings"], inputs["soft_rows"]], dy)


def rounds_to_nearest(backend: str, *dtypes: torch.dtype) -> bool:
    """Triton's interpreter cuts bf16 off instead."""
    return backend != "triton" or device().type == "cuda" or torch.bfloat16 not in dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SOFT_PROMPT)
def test_equals_masked_scatter(case: str, dtype: torch.dtype, backend: str) -> None:
    inputs = inputs_of(dtype, **SOFT_PROMPT[case])
    oracle.check(soft_prompt, naive, inputs, dtype)
    if rounds_to_nearest(backend, dtype):
        assert torch.equal(soft_prompt(**inputs), naive(**inputs))


@pytest.mark.parametrize("soft", DTYPES, ids=str)
@pytest.mark.parametrize("words", DTYPES, ids=str)
def test_tables_of_different_dtypes(words: torch.dtype, soft: torch.dtype, backend: str) -> None:
    inputs = inputs_of(words, soft_dtype=soft, d=129, scale=7.5)
    oracle.check(soft_prompt, naive, inputs, torch.bfloat16 if torch.bfloat16 in (words, soft) else words)
    if rounds_to_nearest(backend, words, soft):
        assert torch.equal(soft_prompt(**inputs), naive(**inputs))


def test_soft_rows_in_fp64_beside_narrower_words(backend: str) -> None:
    inputs = inputs_of(torch.float32, soft_dtype=torch.float64)
    oracle.check(soft_prompt, naive, inputs, torch.float32)


@pytest.mark.parametrize("scale", [None, 7.5])
def test_gradients_in_fp64(scale: float | None) -> None:
    inputs = inputs_of(torch.float64, scale=scale)
    names = ["word_embeddings", "soft_rows"]

    def function(*tables: Tensor) -> Tensor:
        return soft_prompt(**{**inputs, **dict(zip(names, tables, strict=True))})

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in Triton's interpreter
def test_fp16_takes_every_kind_of_number(backend: str) -> None:
    """Halves between neighbours, subnormal and too large numbers, infinity and NaN, in both signs."""
    values = [0.0, 1.0, 2**-24, 2**-25, 3 * 2**-26, 2**-14, 2**-14 - 2**-25, 1 + 2**-11, 1 + 3 * 2**-11]
    values += [65504.0, 65519.0, 65520.0, 1e30, 1e-30, float("inf"), float("nan")]
    rows = torch.tensor([values, [-value for value in values]], device=device())
    words = torch.zeros(1, len(values), dtype=torch.float16, device=device())
    index = torch.tensor([0, 1], device=device())
    torch.testing.assert_close(
        soft_prompt(index, words, rows, index), rows.half(), rtol=0, atol=0, equal_nan=True
    )


def test_ids_at_soft_positions_are_never_looked_up(backend: str) -> None:
    words, rows = torch.zeros(3, 2, device=device()), torch.tensor([[5.0, 6.0]], device=device())
    ids = torch.tensor([0, 3, -1, 2**62, 2], device=device())
    y = soft_prompt(ids, words, rows, torch.tensor([-1, 0, 0, 0, -(2**62)], device=device()))
    assert y.tolist() == [[0, 0], [5, 6], [5, 6], [5, 6], [0, 0]]


def test_on_a_gpu_a_row_that_does_not_exist_is_nan_and_gets_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "triton")
    words = torch.ones(3, 2, device=device(), requires_grad=True)
    rows = torch.ones(2, 2, device=device(), requires_grad=True)
    ids = torch.tensor([0, 3, 2**40, -1, 2, 2, 2], device=device())
    index = torch.tensor([-1, -1, -1, -1, 1, 2, 2**40], device=device())
    y = soft_prompt(ids, words, rows, index)
    assert y.isnan().all(1).tolist() == [False, True, True, True, False, True, True]
    dwords, drows = torch.autograd.grad(y, (words, rows), torch.ones_like(y))
    assert dwords[:, 0].tolist() == [1, 0, 0]
    assert drows[:, 0].tolist() == [0, 1]


def test_frozen_words_are_not_saved_and_get_no_gradient(backend: str) -> None:
    inputs = inputs_of(torch.float32, train_words=False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        y = soft_prompt(**inputs)
    assert all(tensor.data_ptr() != inputs["word_embeddings"].data_ptr() for tensor in saved)
    y.sum().backward()
    assert inputs["word_embeddings"].grad is None
    counts = torch.bincount(inputs["soft_index"][inputs["soft_index"] >= 0], minlength=5)
    assert torch.equal(inputs["soft_rows"].grad, counts[:, None].expand(5, 9).to(torch.float32))


def test_gradient_of_a_row_taken_often_is_summed_in_fp32(backend: str) -> None:
    """In bf16 256 + 1 is 256: a sum of ones would stop there."""
    words = torch.zeros(1, 2, dtype=torch.bfloat16, device=device(), requires_grad=True)
    rows = torch.zeros_like(words, requires_grad=True)
    ids = torch.zeros(600, dtype=torch.int64, device=device())
    index = torch.arange(600, device=device()) % 2 - 1
    for gradient in torch.autograd.grad(soft_prompt(ids, words, rows, index).sum(), (words, rows)):
        assert gradient.tolist() == [[300.0, 300.0]]


def test_gradients_of_rows_that_many_distant_tokens_took(backend: str) -> None:
    new = torch.Generator().manual_seed(0)
    index = torch.where(torch.rand(2500, generator=new) < 0.05, torch.randint(9, (2500,), generator=new), -1)
    index[torch.rand(2500, generator=new) < 0.02] = 3
    dy = torch.randn(2500, 5, generator=new)
    expected = torch.stack([dy[index == row].double().sum(0) for row in range(9)])
    assert (index == 3).sum() > 2 * (index == 4).sum()
    index, dy = index.to(device()), dy.to(device())
    _, drows = torch.ops.rellax.soft_prompt_backward(dy, None, dy.new_empty(9, 5), index, index, None)
    torch.testing.assert_close(drows.cpu(), expected.float())


@pytest.mark.parametrize("rows", [3, 50])
def test_same_bits_every_time(rows: int, backend: str) -> None:
    inputs = inputs_of(torch.float32, shape=(3, 65), rows=rows, d=65)
    for first, second in zip(gradients(inputs), gradients(inputs), strict=True):
        assert torch.equal(first, second)


def test_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    inputs = {
        name: value if value is None else value.cpu().detach().requires_grad_(value.is_floating_point())
        for name, value in inputs_of(torch.float32, shape=(8, 200), rows=7, d=1500).items()
    }
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append((soft_prompt(**inputs), *gradients(inputs)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, four) for one, four in zip(*results, strict=True))


def test_an_output_of_many_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    words, rows = torch.randn(5, 4096), torch.randn(3, 4096)
    generator = torch.Generator().manual_seed(0)
    ids, index = (
        torch.randint(5, (2100,), generator=generator),
        torch.randint(-5, 3, (2100,), generator=generator),
    )
    y = soft_prompt(ids, words, rows, index)
    assert y.nbytes > 32 * 2**20
    assert torch.equal(y, naive(ids, words, rows, index))


BEYOND = 2**20 + 3, 2048  # rows of a table with more than 2^31 elements; its untouched pages take no memory


def test_a_vocabulary_of_more_than_2_to_31_elements(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend == "triton" and device().type == "cpu":
        monkeypatch.setenv("RELLAX_BACKEND", "cpp")  # the interpreter copies its tensors
    words = torch.empty(BEYOND, dtype=torch.bfloat16, device=device())
    last = BEYOND[0] - 1
    words[[0, last]] = torch.tensor([[3.0], [7.0]], device=device()).bfloat16()
    rows = torch.full((1, 2048), 5.0, dtype=torch.bfloat16, device=device())
    index = torch.tensor([-1, 0, -1], device=device())
    y = soft_prompt(torch.tensor([last, 0, 0], device=device()), words, rows, index)
    assert (y == torch.tensor([[7.0], [5.0], [3.0]], device=device())).all()


def test_a_gradient_of_more_than_2_to_31_elements(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend == "triton" and device().type == "cpu":
        monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    operator = torch.ops.rellax.soft_prompt_backward
    dy = torch.empty(BEYOND, dtype=torch.bfloat16, device=device())
    index = torch.full(BEYOND[:1], -1, device=device())
    index[[1, BEYOND[0] - 1]] = torch.tensor([0, 1], device=device())
    dy[[1, BEYOND[0] - 1]] = torch.tensor([[3.0], [7.0]], device=device()).bfloat16()
    _, drows = operator(dy, None, dy.new_empty(2, 2048), index, index, None)
    assert (drows == torch.tensor([[3.0], [7.0]], device=device())).all()


def test_a_million_soft_rows(backend: str) -> None:
    """Fewer where the interpreter would have to run as many programs."""
    count = 300 if backend == "triton" and device().type == "cpu" else 10**6
    rows = torch.randn(count, 2, device=device(), requires_grad=True)
    index = torch.tensor([count - 1, -1, 0, count // 2, count - 1], device=device())
    y = soft_prompt(torch.zeros_like(index), torch.zeros(1, 2, device=device()), rows, index)
    assert torch.equal(y, torch.where(index[:, None] >= 0, rows[index], 0))
    (gradient,) = torch.autograd.grad(y.sum(), rows)
    assert gradient.sum() == 8
    assert gradient[[0, count // 2, count - 1]].tolist() == [[1, 1], [1, 1], [2, 2]]


def test_autocast_changes_nothing(backend: str) -> None:
    inputs = inputs_of(torch.float32, scale=1.7)
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
        y = soft_prompt(**inputs)
    assert torch.equal(y, naive(**inputs))


WRONG = {
    "input_ids": torch.zeros(2, 7),
    "input_ids of another dtype": torch.zeros(2, 7, dtype=torch.int32),
    "input_ids of three dimensions": torch.zeros(1, 2, 7, dtype=torch.int64),
    "word_embeddings": torch.zeros(11, 9, dtype=torch.int64),
    "soft_rows": torch.zeros(5, 8),
    "soft_index": torch.zeros(2, 6, dtype=torch.int64),
    "word_scale": torch.ones(1),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str) -> None:
    name, inputs = case.split()[0], inputs_of(torch.float32)
    inputs[name] = WRONG[case].to(inputs["input_ids"].device)
    with pytest.raises(InputError, match=f"^{name}: expected "):
        soft_prompt(**inputs)


def test_the_scale_is_a_constant() -> None:
    inputs = inputs_of(torch.float32, scale=7.5)
    inputs["word_scale"].requires_grad_()
    with pytest.raises(InputError, match=r"^word_scale: expected a constant"):
        soft_prompt(**inputs)
    with torch.no_grad():
        soft_prompt(**inputs)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "wrong"), [("input_ids", 11), ("input_ids", -1), ("soft_index", 5)])
def test_errors_name_the_value_on_a_cpu(
    name: str, wrong: int, compiled: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", backend)
    inputs = inputs_of(torch.float32, share=0.0)
    inputs = {key: value.cpu() for key, value in inputs.items() if value is not None}
    inputs[name][1, 3] = wrong
    run = torch.compile(soft_prompt, backend="aot_eager") if compiled else soft_prompt
    with pytest.raises(InputError, match=rf"^{name}: expected a row of .*, got {wrong}(\n|$)"):
        run(**inputs)
