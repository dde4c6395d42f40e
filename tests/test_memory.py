"""Memory stays flat: over many steps nothing is kept, and large files are written and read in parts."""

from __future__ import annotations

import errno
import gc
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from workspace import GATED, Workspace

from rellax import _files, subr
from rellax.ctr import runs
from rellax.ctr.config import TrainConfig
from rellax.ctr.tensor_file import write_tensors
from rellax.ctr.train import train


def resident() -> int:
    """Bytes of this process in memory that are its own, not those of mapped files."""
    pages, of_files = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(pages) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")


def memory_while_training(config: TrainConfig, out: Path) -> list[int]:
    """Resident bytes after every tenth step."""
    append, seen = runs.Log.append, []

    def watch(self: runs.Log, **entry: Any) -> None:
        append(self, **entry)
        if entry["step"] % 10 == 0:
            seen.append(resident())

    with mock.patch.object(runs.Log, "append", watch):
        train(config, out, progress=False)
    return seen


@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_training_keeps_nothing(workspace: Workspace, tmp_path: Path, steps: int) -> None:
    """From a fifth of the way on, the least memory of each tenth; with validations, checkpoints and a log.

    In a process of its own, because what other tests leave behind comes and goes. One tenth does not count:
    an allocator may take another block, while what is kept grows in all of them.
    """
    config = workspace.config(
        stage="joint",
        epochs=steps // 10,
        shots=10,
        batch_size=2,
        validation_samples=6,
        validate_every=100,
        checkpoint_every=50,
        **GATED,
    )
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        seen = process.submit(memory_while_training, config, tmp_path / "run").result()
    assert len(seen) == steps // 10
    grown = np.diff([min(tenth) for tenth in np.array_split(seen, 10)])[2:] / 2**20
    print(f"MiB more in each tenth of {steps} steps: {grown.round(2)}, of {seen[-1] / 2**20:.0f}")  # noqa: T201
    assert np.sort(grown)[:-1].sum() < 4


def test_tensors_are_written_in_blocks_and_read_by_rows(tmp_path: Path) -> None:
    rows, block = 1 << 20, 1 << 12
    blocks = (np.full((block, 64), number, np.float32) for number in range(rows // block))
    few = np.arange(6, dtype=np.float32).reshape(2, 3)
    gc.collect()
    before = resident()
    write_tensors(
        tmp_path / "x.safetensors",
        {"few": (2, 3), "many": (rows, 64)},
        {"few": [few[:1], few[1:]], "many": blocks},
    )
    tensors = load_file(tmp_path / "x.safetensors")
    taken = tensors["many"][[5, rows - 1, rows // 2]]
    assert resident() - before < 32 * 2**20  # of 256 MiB
    assert torch.equal(tensors["few"], torch.from_numpy(few))
    assert taken.tolist() == [[float(row // block)] * 64 for row in (5, rows - 1, rows // 2)]


def test_a_large_scratch_array_is_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_SCRATCH", 1000)
    assert type(_files.scratch_array((10, 3), np.int16)) is np.ndarray
    large = _files.scratch_array((1000, 3), np.int16)
    assert isinstance(large, np.memmap)
    large[[5, 999]] = 7
    assert large.sum() == 42
    monkeypatch.setattr(os, "posix_fallocate", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
    assert type(_files.scratch_array((1000, 3), np.int16)) is np.ndarray


def test_history_keys_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([0, 4, 0, 1, 9, 0])  # users without behaviours, and one longer than a block
    offsets, items = np.append(0, lengths.cumsum()), rng.integers(50, size=14)
    user = np.repeat(np.arange(6), lengths)
    position = np.arange(14) - offsets[user]
    arguments = rng.integers(1 << 63, size=6).astype(np.uint64), items, offsets, user, position, items
    whole = subr.history_keys(*arguments)
    assert len(np.unique(whole)) == 14
    for block in (1, 3, 13, 14):
        monkeypatch.setattr(sys.modules["rellax.subr.retrieve"], "_BLOCK", block)
        assert np.array_equal(subr.history_keys(*arguments), whole)
