"""The threads of the C++ kernels: any number of callers, and processes forked after the first call."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rellax.ops
from rellax.ops import history_topk
from rellax.ops._register import extension
from rellax.testing import cases

pytest.importorskip("rellax._C")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def nearest(seed: int) -> Tensor:
    """Some thousands of queries: more work than one thread takes at once."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randint(-4, 5, (500, 64), generator=generator).float()
    items = torch.randint(500, (3000,), generator=generator)
    return history_topk(embeddings, items, torch.tensor([0, 1000, 3000]), 5)[0]


def test_callers_side_by_side_get_what_they_get_alone() -> None:
    alone = [nearest(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as callers:
        together = list(callers.map(nearest, range(8)))
    for expected, got in zip(alone, together, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def pieces_of_equal_items(threads: int) -> list[int]:
    """A call of the extension alone: after a fork, torch's own threads cannot be relied on."""
    ones, k = torch.ones(64, 512), 3
    index = {name: torch.zeros(2000, dtype=torch.int64) for name in ("items", "target", "user")}
    offsets, end = torch.tensor([0, 2000]), torch.full((2000,), 2000)
    positions = torch.empty((2000, k), dtype=torch.int64)
    scores = torch.empty((2000, k))
    extension().history_topk(
        embeddings=ones.data_ptr(),
        dtype="float32",
        count=64,
        dim=512,
        **{name: tensor.data_ptr() for name, tensor in index.items()},
        offsets=offsets.data_ptr(),
        users=1,
        end=end.data_ptr(),
        queries=2000,
        k=k,
        positions=positions.data_ptr(),
        scores=scores.data_ptr(),
        threads=threads,
    )
    return positions[-1].tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads is what is tested
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    assert pieces_of_equal_items(threads=4) == [1999, 1998, 1997]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(pieces_of_equal_items(threads=4)))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == [1999, 1998, 1997]
    finally:
        child.kill()
        child.join()


def results(operator: str, seed: int) -> list[Tensor]:
    """Outputs and gradients of an operator, large enough for several threads."""
    large = {
        "answer_loss": {"vocabulary": 5000, "d": 64, "train_head": False},
        "cflora_linear": {"lengths": [90, 90], "d_in": 257, "d_out": 255, "r": 8},
        "cflora_linears": {"lengths": [90, 90], "d_in": 257, "d_outs": (255, 129), "r": 8},
        "cflora_update": {"lengths": [90, 90], "d_in": 257, "d_out": 255, "r": 8},
        "gate_bank": {"projections": 33, "instances": 40, "d_u": 33, "r": 6},
        "history_topk": {"lengths": (400, 500), "items": 100},
        "item_topk": {"items": 300},
        "soft_prompt": {"shape": (4, 200), "d": 600, "rows": 9},
    }
    build, _ = cases.OPERATORS[operator]
    inputs = build(torch.float32, **large[operator])
    for value in inputs.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.detach().mul_(1 + seed / 8)
    outputs = getattr(rellax.ops, operator)(**inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    roots = [output.square().sum() for output in outputs if output.requires_grad]
    return outputs + (list(torch.autograd.grad(sum(roots), leaves)) if roots else [])


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_every_operator_side_by_side(operator: str) -> None:
    alone = [results(operator, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as callers:
        together = list(callers.map(lambda seed: results(operator, seed), range(4)))
    for expected, got in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


class Searches(torch.utils.data.Dataset[Tensor]):
    """What the workers of a DataLoader compute."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, seed: int) -> Tensor:
        return nearest(seed)[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_workers_that_a_data_loader_forks_after_the_first_call() -> None:
    expected = [nearest(seed)[-1] for seed in range(6)]
    loader = torch.utils.data.DataLoader(
        Searches(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for got, alone in zip(loader, expected, strict=True):
        assert torch.equal(got, alone)
