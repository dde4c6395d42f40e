"""Two processes give the gradients and the runs of one, Trainer takes the steps of a plain loop."""

from __future__ import annotations

import dataclasses
import faulthandler
import itertools
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from launched import free_port, job, launch, leave
from safetensors.torch import load_file
from test_patch import CHECKPOINTS, close, set_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from workspace import GATED, Workspace

from rellax.ctr import parallel
from rellax.ctr.train import train
from rellax.patch import load_adapter

RANKS = 2


def _whole_batch() -> list[tiny.Instance]:
    return tiny.instances(seed=3)[:2] + tiny.instances(seed=4)[:2]


def _model(kind: str) -> Any:
    model = tiny.patched(tiny.base_model())
    set_checkpointing(model, kind)
    return model


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    faulthandler.dump_traceback_later(90)  # where it waits, before gloo gives up
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=timedelta(seconds=600))
    share = tiny.batch(_whole_batch()[2 * rank : 2 * rank + 2])
    for wrap, kind in itertools.product(WRAPS, CHECKPOINTS):
        model = _model(kind)
        wrapped = wrap(model)
        for _ in range(2):  # DDP's second backward pass runs with its buckets rebuilt
            model.zero_grad()  # before the forward pass: within it FSDP swaps the parameters
            gradients = tiny.gradients(model, wrapped(**share).loss)
            if wrap is _frozen_fsdp:
                parallel.average_gradients(tiny.trainable(model).values())
                gradients = {name: parameter.grad for name, parameter in tiny.trainable(model).items()}
        mine = {name: g.to_local() if wrap is _fsdp else g for name, g in gradients.items()}
        torch.save(mine, Path(folder) / f"{wrap.__name__}-{kind}-{rank}.pt")
    leave()


def _ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def _fsdp(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _frozen_fsdp(model: Any) -> Any:
    """As `rellax train --fsdp`: each process holds half of what is frozen, and all that is trained."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    parallel.shard(model, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) is (name in frozen), name
        if name in frozen:
            assert abs(2 * len(parameter.to_local()) - len(parameter)) <= 1, name
    return model


WRAPS = (_ddp, _fsdp, _frozen_fsdp)


def test_two_ranks_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(free_port(), str(tmp_path)), nprocs=RANKS)
    model = _model("none")
    expected = tiny.gradients(model, model(**tiny.batch(_whole_batch())).loss)
    for wrap, kind in itertools.product(WRAPS, CHECKPOINTS):
        files = [tmp_path / f"{wrap.__name__}-{kind}-{rank}.pt" for rank in range(RANKS)]
        found = [torch.load(file, weights_only=True) for file in files]
        if wrap is _fsdp:  # each process has its rows of every gradient
            found = [{name: torch.cat([part[name] for part in found]) for name in expected}]
        for gradients in found:
            close(gradients, expected)


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _assert_same_curve(expected: Path, found: Path, rel: float = 1e-3) -> None:
    one, two = _log(expected), _log(found)
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "grad_norm", "validation_log_loss"}:
            assert b[name] == pytest.approx(a[name], rel=rel), (a["step"], name)


def _assert_same_adapter(expected: Path, found: Path) -> None:
    one, two = (load_file(run / "adapter" / "adapter.safetensors") for run in (expected, found))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_two_processes_run_as_one(workspace: Workspace, tmp_path: Path) -> None:
    """The loss curve of one process at the same batch, by DDP and by FSDP2, in every way a step can be taken.

    Batches of 5 do not divide by two, and the last one has 3 prompts: with one prompt at once, one process
    takes a step more than the other. A stopped run goes on with two processes or with one.
    """
    base = workspace.config(
        stage="joint", dropout=0.0, epochs=1, lr=1e-3, shots=9, batch_size=5, validate_every=2, **GATED
    )
    start = tmp_path / "start"
    train(workspace.config(dropout=0.0), start, progress=False)
    configs = {"bf16": dataclasses.replace(base, dtype="bfloat16", packing="never", lr=1e-4)}
    configs["stage-2"] = workspace.config(
        stage="2", start=str(start), epochs=1, lr=1e-3, shots=9, batch_size=4, prompts="recent", **GATED
    )
    for packing, frugal in itertools.product(("never", "always"), (False, True)):
        size = 1 if frugal else 8
        configs[f"{packing}-{size}"] = dataclasses.replace(
            base, packing=packing, micro_batch_size=size, gradient_checkpointing=frugal
        )
    jobs = [
        job(config, tmp_path / f"{name}-{fsdp}", options={"fsdp": fsdp})
        for name, config in configs.items()
        for fsdp in (False, True)
    ]
    stopped = configs["always-1"]
    options: dict[str, Any] = {"options": {"fsdp": True}}
    jobs += [job(stopped, tmp_path / name, step=2, **options) for name in ("resumed", "left")]
    jobs += [job(stopped, tmp_path / "resumed", **options)]
    done = launch(jobs, processes=RANKS)
    assert done.returncode == 0, done.stderr[-5000:]
    for name, config in configs.items():
        train(config, tmp_path / name, progress=False)
        for fsdp in (False, True):
            _assert_same_curve(
                tmp_path / name, tmp_path / f"{name}-{fsdp}", rel=0.1 if name == "bf16" else 1e-3
            )
        _assert_same_adapter(tmp_path / f"{name}-False", tmp_path / f"{name}-True")
    _assert_same_adapter(tmp_path / "always-1-True", tmp_path / "resumed")
    train(stopped, tmp_path / "left", progress=False)
    _assert_same_curve(tmp_path / "always-1", tmp_path / "left")


def test_compiled_and_boosted_on_two_processes(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(
        stage="joint", dropout=0.0, epochs=1, lr=1e-3, shots=8, compile=True, crm_logit=True, **GATED
    )
    done = launch(
        [job(config, tmp_path / f"run-{fsdp}", options={"fsdp": fsdp}) for fsdp in (False, True)],
        processes=RANKS,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    train(dataclasses.replace(config, compile=False), tmp_path / "run", progress=False)
    for fsdp in (False, True):
        _assert_same_curve(tmp_path / "run", tmp_path / f"run-{fsdp}", rel=1e-3)


@pytest.mark.parametrize("fail", range(RANKS))
def test_an_error_of_one_process_ends_all(workspace: Workspace, tmp_path: Path, fail: int) -> None:
    config = workspace.config(epochs=20)
    done = launch([job(config, tmp_path / "run", step=4, fail=fail)], processes=RANKS)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps == ["step-000002"]


def test_accelerate_launch(workspace: Workspace, tmp_path: Path) -> None:
    """The command line, sharded as accelerate is told to."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(RANKS)]
    command += ["--main_process_port", str(free_port()), "--use_fsdp", "--fsdp_version", "2", "-m", "rellax"]
    command += ["train", "launched", "--work", str(workspace.root), "--model", str(workspace.model)]
    command += ["--device", "cpu", "--threads", "1", "--shots", "8", "--k", "3", "--r", "2"]
    command += ["--validation-samples", "9", "--dtype", "float32"]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "train: 2 processes, each holds a part of the frozen weights (FSDP2)" in done.stderr
    assert (workspace.root / "launched" / "metrics.json").exists()


class Prompts(torch.utils.data.Dataset):
    """Single instances; Trainer keeps the columns that the model's forward takes, the collator pads."""

    def __init__(self, made: list[tiny.Instance]) -> None:
        self.made = made

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = self.made[index]
        return {"input_ids": one.tokens, "item_ids": one.items, "instance_embed": one.embed, "labels": 0}


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return tiny.batch(
        [tiny.Instance(row["input_ids"], row["item_ids"], row["instance_embed"]) for row in rows]
    )


def test_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """And the checkpoint is a whole model for `from_pretrained` and `load_adapter`."""
    made = tiny.instances()

    def trainer() -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        model = tiny.patched(tiny.base_model(dtype=torch.float32))
        return Trainer(model, arguments, data_collator=_collate, train_dataset=Prompts(made))

    straight = trainer()
    straight.train()
    first = tmp_path / "checkpoint-1"
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(first), first)
    assert not torch.equal(loaded(**tiny.batch(made)).loss, straight.model(**tiny.batch(made)).loss)
    resumed = trainer()
    tiny.randomise(resumed.model, seed=9)
    resumed.train(resume_from_checkpoint=str(first))
    found, expected = (dict(done.model.named_parameters()) for done in (resumed, straight))
    assert all(torch.equal(parameter, expected[name]) for name, parameter in found.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_the_steps_of_a_plain_loop(tmp_path: Path, checkpointing: bool) -> None:
    made = [one for seed in range(4) for one in tiny.instances(seed=seed)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=0.0,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": True} if checkpointing else None,
    )
    model = tiny.patched(tiny.base_model())
    trainer = Trainer(model, arguments, data_collator=_collate, train_dataset=Prompts(made))
    trainer.train()

    plain = tiny.patched(tiny.base_model())
    optimizer = torch.optim.AdamW(tiny.trainable(plain).values(), lr=1e-2, weight_decay=0.0)
    for step in (0, 6, 0):
        optimizer.zero_grad()
        plain(**tiny.batch(made[step : step + 6])).loss.backward()
        optimizer.step()
    close(tiny.trainable(model), tiny.trainable(plain))
    prediction = trainer.predict(Prompts(made))  # in batches of 8
    plain.eval()
    expected = torch.cat([plain(**tiny.batch(made[i : i + 8])).answer_logits for i in (0, 8)])
    close(torch.from_numpy(prediction.predictions), expected)
