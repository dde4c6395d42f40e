"""The checkpoints of a training run: the last two, and the best adapters that they name."""

from __future__ import annotations

import io
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from rellax._files import atomic_folder, read_json, sha256_file, write_json
from rellax.errors import InputError, one_line

logger = logging.getLogger(__name__)

_KEPT = 2
_STATE = "state.pt"
_RECORD = "checkpoint.json"


class Checkpoints:
    """A folder with a folder for each checkpoint, and one for each best step that a checkpoint names.

    An older checkpoint goes when the new one is complete, and a best step when no checkpoint names it: so
    there is always a checkpoint to go on from, which has all that it needs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def best(self, step: int) -> Path:
        """Where the adapter and the predictions of a best step are."""
        return self.folder / f"best-{step:06d}"

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; `state` has `step`, and as `best` None or a dictionary with a `step`.

        Raises:
            OSError: the disk is full, say; earlier checkpoints are then as they were.
        """
        best = None if state["best"] is None else state["best"]["step"]
        with atomic_folder(self._path(state["step"])) as part:
            buffer = io.BytesIO()  # torch reports a full disk as an error of its own
            torch.save(state, buffer)
            (part / _STATE).write_bytes(buffer.getbuffer())
            write_json(part / _RECORD, {"best_step": best, "sha256": sha256_file(part / _STATE)})
        self._remove_older()

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU; None where there is none at all.

        Raises:
            InputError: every checkpoint is damaged.
        """
        steps, problems = self._steps(), []
        for step in reversed(steps):
            try:
                state = self._read(step)
            except InputError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                logger.warning("%s; the run goes on from step %d", problem, step)
            return state
        if problems:
            raise InputError(f"{problems[0]}, and so is every other; begin anew with --redo")
        return None

    def _read(self, step: int) -> dict[str, Any]:
        path = self._path(step)
        record, file = read_json(path / _RECORD), path / _STATE
        if not isinstance(record, dict) or not {"best_step", "sha256"} <= record.keys():
            raise InputError(f"{path / _RECORD}: expected a checkpoint's record, but it is damaged")
        if not file.is_file() or sha256_file(file) != record["sha256"]:
            raise InputError(f"{file}: expected a checkpoint, but it is damaged")
        best = record["best_step"]
        if best is not None and not (self.best(best) / "adapter").is_dir():
            raise InputError(f"{self.best(best)}: expected the adapter that {path.name} names, found none")
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # whole, but not of this program
            raise InputError(
                f"{file}: expected a checkpoint, found something else ({one_line(error)})"
            ) from None
        return state

    def _remove_older(self) -> None:
        """Remove what no longer counts, as far as it can be removed now; the next checkpoint tries again."""
        steps = self._steps()
        named = {read_json(self._path(step) / _RECORD)["best_step"] for step in steps[-_KEPT:]}
        older = [self._path(step) for step in steps[:-_KEPT]]
        older += [path for path in self.folder.glob("best-*") if int(path.name[5:]) not in named]
        older += self.folder.glob(".step-*")  # what a killed run was writing
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def _steps(self) -> list[int]:
        """Steps of all checkpoints, rising."""
        names = (path.name for path in self.folder.glob("step-*"))
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"
