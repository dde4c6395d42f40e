"""The threads of the C++ kernels: any number of callers, and processes forked after the first call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import rellax.ops
from rellax.ops import history_topk
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


FORK = """
import multiprocessing, os, sys
import torch
from rellax.ops._register import extension

def lse():
    # Two slices of a vocabulary, and the extension alone: a child cannot rely on torch's own threads.
    zeros, result = torch.zeros(4096), torch.empty(1)
    extension().answer_forward(
        dtype="float32", n=1, d=1, vocabulary=4096, rows=zeros.data_ptr(), weight=zeros.data_ptr(),
        weight_stride=1, bias=0, softcap=0.0, lse=result.data_ptr(), mean=0, threads=4,
    )
    return round(result.item(), 3)

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
before = threads()
lse() if sys.argv[1] == "rellax" else torch.ones(2**21) + 1
assert threads() > before, "no thread has started that a child could wait for"
context = multiprocessing.get_context("fork")
receiver, sender = context.Pipe(duplex=False)
child = context.Process(target=lambda: sender.send(lse()))
child.start()
try:
    assert receiver.poll(60), "the child hangs"
    assert receiver.recv() == 8.318
finally:
    child.kill()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
@pytest.mark.parametrize("first", ["rellax", "torch"])
def test_a_forked_child_does_not_wait_for_its_parents_threads(first: str) -> None:
    """Whether an operator has started them or torch by itself."""
    command = [sys.executable, "-W", "ignore", "-c", FORK, first]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


TEAMS = """
import os
import torch
from rellax.ops import cflora_linear, history_topk

def threads():
    torch.ones(2**21) + 1  # all that torch has
    return set(os.listdir("/proc/self/task"))

torch.set_num_threads(6)
x, weight = torch.randn(2, 100, 1024), torch.randn(1024, 1024)
a, b = torch.randn(8, 1024), torch.randn(1024, 8)
table, items, offsets = torch.randn(9000, 512), torch.arange(3000), torch.arange(0, 3001, 1000)
calls = [
    lambda: cflora_linear(x, weight, None, a, b, None, 1.0),
    lambda: history_topk(table, items, offsets, 3),
]
for call in calls:
    call()
    before = threads()
    for _ in range(3):
        call()
        assert threads() == before
assert len(before) >= 6
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_torch_keeps_its_threads() -> None:
    """OpenMP ends those that a smaller team has no use for, and starts new ones for the next."""
    command = [sys.executable, "-W", "ignore", "-c", TEAMS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


PRELOADED = """
#include <dlfcn.h>
typedef void (*Region)(void (*)(void*), void*, unsigned, unsigned);
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
    ((Region)dlsym(RTLD_NEXT, "GOMP_parallel"))(function, data, threads, flags);
}
"""


def test_the_runtime_is_the_one_that_torch_was_given(tmp_path: Path) -> None:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "preloaded.c", tmp_path / "preloaded.so"
    source.write_text(PRELOADED)
    subprocess.run([compiler, "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    code = (
        "import ctypes; from rellax.ops._register import _openmp_entry as entry; "
        f"assert entry() == ctypes.cast(ctypes.CDLL({str(library)!r}).GOMP_parallel, ctypes.c_void_p).value"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
        Searches(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=300
    )
    for got, alone in zip(loader, expected, strict=True):
        assert torch.equal(got, alone)
