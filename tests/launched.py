"""Training runs, one after another, for tests that start them in processes of their own.

python launched.py JOBS     JOBS: a JSON list of {"config", "folder"} and maybe
    "options"   of `train`
    "step"      the step after whose checkpoint Ctrl-C comes, or else
    "kill"      where in that step SIGKILL comes, to a process forked for this job: "step" (gradients are
                there, the parameters not yet changed), "checkpoint" (half of one is written) or "validated"
                (the validation is done, its checkpoint not begun)
    "fail"      the process that finds the disk full in that step
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from rellax.ctr.config import TrainConfig
from rellax.ctr.train import _Trainer, train


def job(config: TrainConfig, folder: Path, **more: Any) -> dict[str, Any]:
    return {"config": config.to_json(), "folder": str(folder), **more}


def launch(jobs: list[dict[str, Any]], *, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the jobs in one process, or under torchrun in several."""
    command = [sys.executable]
    if processes is not None:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-port", str(free_port())]
    return subprocess.run(
        [*command, __file__, json.dumps(jobs)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads() if processes is None else 1)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def leave() -> None:
    """End one of several processes, once all are here; without clean-up, in which torch has aborted once."""
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def interrupted(step: int, kill: str | None = None, fail: int | None = None) -> Any:
    """A context in which a run is stopped at `step`."""
    original = {name: getattr(_Trainer, name) for name in ("_train_step", "_backward", "_save_checkpoint")}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(self: Path, data: memoryview) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        die()
        return 0

    def backward(self: Any, *args: Any) -> Any:
        total = original["_backward"](self, *args)
        if kill == "step" and self.step + 1 == step:
            die()
        return total

    def train_step(self: Any) -> Any:
        if fail == self.accelerator.process_index and self.step + 1 == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original["_train_step"](self)

    def save_checkpoint(self: Any) -> None:
        if self.step == step and kill == "validated":
            die()
        with mock.patch.object(Path, "write_bytes", half) if self.step == step and kill else mock.MagicMock():
            original["_save_checkpoint"](self)
        if self.step == step and kill is fail is None:
            self.accelerator.wait_for_everyone()
            raise KeyboardInterrupt

    return mock.patch.multiple(
        _Trainer, _train_step=train_step, _backward=backward, _save_checkpoint=save_checkpoint
    )


def run(config: dict[str, Any], folder: str, options: dict[str, Any] | None = None, **stop: Any) -> None:
    config = config | {"target_modules": tuple(config["target_modules"])}

    def start() -> None:
        train(TrainConfig(**config), folder, device="cpu", progress=False, **options or {})

    if not stop:
        start()
        return
    with interrupted(**stop):
        try:
            start()
        except KeyboardInterrupt:
            return
    raise AssertionError("the run was to be stopped")


def run_forked(one: dict[str, Any]) -> None:
    if not (process := os.fork()):
        run(**one)
        os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        run_forked(one) if one.get("kill") else run(**one)
    if torch.distributed.is_initialized():
        leave()
