"""Training: what each stage trains, what a stop changes (nothing), and what chooses the step."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launched import job, launch, run
from safetensors.torch import load_file
from scipy.special import expit, logit
from torch._inductor.exc import InvalidCxxCompiler
from transformers import get_scheduler
from workspace import GATED, Workspace

import rellax
from rellax.ctr import cli, runs
from rellax.ctr.checkpoints import Checkpoints
from rellax.ctr.config import SCHEDULES, TrainConfig, read_config
from rellax.ctr.dataset import Dataset
from rellax.ctr.evaluate import evaluate
from rellax.ctr.optimiser import adamw, learning_rate
from rellax.ctr.options import make_parser
from rellax.ctr.task import Task, load_inputs
from rellax.ctr.train import _Trainer, train
from rellax.errors import InputError
from rellax.patch import adapter as adapters


@pytest.fixture(scope="module")
def stage_1(workspace: Workspace) -> Path:
    folder = workspace.root / "stage-1"
    train(workspace.config(), folder, progress=False)
    return folder


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    """The entries of a run, without the times."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()
    assert log(one) == log(other)
    expected, found = adapter(one), adapter(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert pq.read_table(one / "predictions.parquet").equals(pq.read_table(other / "predictions.parquet"))


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Kinds of tensors, of those in both, that differ."""
    names = (name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name]))
    return {name.split(".")[1] if name.startswith("rellax") else name.rsplit(".", 1)[1] for name in names}


def test_learning_rate_rises_then_falls(workspace: Workspace) -> None:
    config = workspace.config(lr=2.0, warmup=0.2)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[4:] == pytest.approx([2.0 * (20 - step) / 16 for step in range(4, 20)])
    assert [learning_rate(workspace.config(lr=2.0, warmup=0.0), step, 2) for step in range(2)] == [2.0, 1.0]
    assert workspace.config(lr=None).peak_lr == 1e-3
    assert workspace.config(lr=None, stage="2", start="x", **GATED).peak_lr == 3e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_transformers(workspace: Workspace, schedule: str) -> None:
    """After the rise, which here ends at the first step that follows it."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    scheduler = get_scheduler(name, optimiser, num_warmup_steps=5, num_training_steps=50)
    config = workspace.config(lr=3.0, warmup=0.1, schedule=schedule)
    for step in range(50):
        rate = learning_rate(config, step, 50)
        if step < 5:
            assert rate == pytest.approx(3.0 * (step + 1) / 5)
        else:
            assert rate == pytest.approx(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()


def test_weight_decay_is_for_matrices(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(stage="joint", epochs=1, lr=1e-3, dropout=0.0, warmup=0.0, **GATED)
    for decay in (0.0, 0.5):
        changes = {"weight_decay": decay, "batch_size": 20, "schedule": "constant"}
        train(dataclasses.replace(config, **changes), tmp_path / str(decay), progress=False)
    plain, decayed = adapter(tmp_path / "0.0"), adapter(tmp_path / "0.5")
    task = Task(config, load_inputs(config))
    start = {name: p.detach() for name, p in task.model.named_parameters() if p.requires_grad}
    assert {name for name in start if name.endswith(("bias", "b1", "b2", "ln_weight"))}
    for name, before in start.items():
        is_kept = name.endswith(("bias", "b1", "b2", "ln_weight"))
        expected = plain[name] if is_kept else plain[name] - 1e-3 * 0.5 * before
        torch.testing.assert_close(decayed[name], expected, rtol=1e-5, atol=1e-8)


def test_soft_prompts_have_a_rate_of_their_own(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(stage="joint", epochs=1, soft_prompt_lr=1e-12, **GATED)
    begun = dict(Task(config, load_inputs(config)).model.named_parameters())
    train(config, tmp_path / "run", progress=False)
    moved = {
        name: (tensor - begun[name]).abs().max().item()
        for name, tensor in load_file(tmp_path / "run" / "adapter" / "adapter.safetensors").items()
        if name in begun
    }
    soft = {name for name in moved if "projector" in name}
    assert 4 == len(soft) < len(moved)
    assert all((moved[name] < 1e-9) == (name in soft) for name in moved)


def test_the_rate_of_soft_prompts_is_a_share_of_the_others(workspace: Workspace) -> None:
    config = workspace.config(stage="joint", lr=4e-4, soft_prompt_lr=1e-4, weight_decay=0.0, **GATED)
    names = ("rellax.soft_prompt.projector.0.weight", "rellax.gate_bank.w1")
    groups = adamw({name: torch.nn.Parameter(torch.zeros(1)) for name in names}, config).param_groups
    assert [group["share"] for group in groups] == [0.25, 1.0]


def test_run_folder(stage_1: Path, workspace: Workspace) -> None:
    names = {path.name for path in stage_1.iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "place.json",
        "wording.json",
        "log.jsonl",
        "metrics.json",
        "predictions.parquet",
        "curves.png",
        "adapter",
    }
    assert read_config(stage_1) == workspace.config()
    assert (stage_1 / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [entry["step"] for entry in log(stage_1)] == list(
        range(1, 11)
    )  # 10 shots twice, batches of 4, 2 epochs
    table = pq.read_table(stage_1 / "predictions.parquet")
    samples = Dataset.load(workspace.data).samples
    assert table["label"].to_pylist() == samples.label[table["sample"].to_numpy()].tolist()


def test_stage_1_trains_a_and_b_and_lowers_the_loss(
    stage_1: Path, workspace: Workspace, tmp_path: Path
) -> None:
    tensors = adapter(stage_1)
    assert {name.rsplit(".", 1)[1] for name in tensors} == {"lora_a", "lora_b"}
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in tensors.values())
    train(
        workspace.config(epochs=20, lr=0.05, dropout=0.0, prompts="recent"), tmp_path / "long", progress=False
    )
    losses = [entry["loss"] for entry in log(tmp_path / "long")]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"interaction": "full"}, {"gate_bank"}),
        ({"soft_prompt": True}, {"soft_prompt"}),
        ({"interaction": "diagonal", "soft_prompt": True}, {"gate_bank", "soft_prompt"}),
    ],
    ids=["cflora", "spa", "both"],
)
def test_stage_2_trains_gates_and_projector_alone(
    stage_1: Path, workspace: Workspace, tmp_path: Path, parts: dict[str, Any], expected: set[str]
) -> None:
    config = workspace.config(stage="2", start=str(stage_1), **parts)
    train(config, tmp_path / "run", progress=False)
    first, second = adapter(stage_1), adapter(tmp_path / "run")
    assert first.keys() <= second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    task = Task(config, load_inputs(config))
    start = {f"rellax.{name}": tensor for name, tensor in task.model.rellax.state_dict().items()}
    assert changed(start, second) == expected
    assert ("rellax.soft_prompt.item_embeddings" in second) == ("soft_prompt" in expected)


def test_joint_trains_everything(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(stage="joint", **GATED)
    train(config, tmp_path / "run", progress=False)
    task, final = Task(config, load_inputs(config)), adapter(tmp_path / "run")
    start = {name: p.detach() for name, p in task.model.named_parameters() if p.requires_grad}
    assert changed(start, final) == {"lora_a", "lora_b", "gate_bank", "soft_prompt"}
    table = "rellax.soft_prompt.item_embeddings"
    assert torch.equal(final[table], load_inputs(config).item_embeddings)


def test_the_model_is_patched_as_configured(workspace: Workspace) -> None:
    lora: dict[str, Any] = {"r": 3, "alpha": 5.0, "dropout": 0.25, "target_modules": ("o_proj", "up_proj")}
    parts = {"interaction": "diagonal", "gate_init": "kaiming", "loss": "vocab"}
    config = workspace.config(stage="joint", soft_prompt=True, **lora, **parts)
    inputs = load_inputs(config)
    task = Task(config, inputs)
    found = task.model.rellax.config
    assert {name: getattr(found, name) for name in lora | parts} == lora | parts
    assert found.answer_ids == task.collator.answer_ids
    assert inputs.instance_embeddings is not None
    assert found.cond_dim == inputs.instance_embeddings.shape[1]
    assert {projection.dropout for projection in task.model.rellax.projections.values()} == {0.25}
    assert torch.equal(task.model.rellax.soft_prompt.item_embeddings, inputs.item_embeddings)


@pytest.mark.parametrize("gate_init", ["identity", "kaiming"])
def test_gates_begin_as_configured(workspace: Workspace, tmp_path: Path, gate_init: str) -> None:
    """And the command line configures it."""
    gates = {"stage": "joint", "interaction": "full", "gate_init": gate_init}
    train(workspace.config(**gates, epochs=1, shots=4, lr=1e-12), tmp_path / "run", progress=False)
    largest = adapter(tmp_path / "run")["rellax.gate_bank.w2"].abs().max()
    assert largest > 0.1 if gate_init == "kaiming" else largest < 1e-9
    words = [word for name, value in gates.items() for word in (f"--{name.replace('_', '-')}", value)]
    options = make_parser().parse_args(["train", "run", "--model", "x", *words])
    assert cli._train_config(options).gate_init == gate_init


def test_stage_2_starts_at_the_stage_1_model(stage_1: Path, workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(stage="2", start=str(stage_1), interaction="full", lr=1e-12, dropout=0.0)
    train(config, tmp_path / "run", progress=False)
    one, two = (
        pq.read_table(run / "predictions.parquet")["probability"] for run in (stage_1, tmp_path / "run")
    )
    assert two.to_numpy() == pytest.approx(one.to_numpy(), abs=1e-6)


def test_boosted_it_starts_at_the_sum_of_both_models(
    stage_1: Path, workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="rellax")
    evaluate(stage_1, samples=9, progress=False)
    parts = {"interaction": "full", "crm_logit": True, "lr": 1e-12, "dropout": 0.0}
    train(workspace.config(stage="2", start=str(stage_1), **parts), tmp_path / "run", progress=False)
    evaluate(tmp_path / "run", samples=9, progress=False)
    crm = pq.read_table(workspace.crm / "predictions.parquet")["probability"].to_numpy()
    for name in (".", "test"):
        plain, run = (
            pq.read_table(folder / name / "predictions.parquet") for folder in (stage_1, tmp_path / "run")
        )
        assert run["sample"].equals(plain["sample"])
        begin = logit(crm[plain["sample"].to_numpy()].astype(float))
        found, alone = (table["probability"].to_numpy() for table in (run, plain))
        assert found == pytest.approx(expit(logit(alone) + begin), abs=1e-6)
        assert abs(found - alone).max() > 1e-4
    assert read_config(tmp_path / "run").crm_logit
    assert "`rellax crm --hold-out 10 --seed 0` makes one that has not" in caplog.text
    caplog.clear()
    held_out = shutil.copytree(workspace.crm, tmp_path / "crm") / "config.json"
    held_out.write_text(json.dumps(json.loads(held_out.read_text()) | {"hold_out": 10}))
    parts |= {"crm": str(held_out.parent), "epochs": 1}
    train(workspace.config(stage="2", start=str(stage_1), **parts), tmp_path / "again", progress=False)
    assert "rellax crm" not in caplog.text
    assert not read_config(stage_1).crm_logit


def test_what_begins_with_a_boosted_run_is_boosted(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace.config(crm_logit=True, epochs=1), tmp_path / "one", progress=False)
    config = workspace.config(
        stage="2", start=str(tmp_path / "one"), interaction="full", lr=1e-12, dropout=0.0
    )
    train(config, tmp_path / "two", progress=False)
    assert read_config(tmp_path / "two").crm_logit
    one, two = (
        pq.read_table(tmp_path / run / "predictions.parquet")["probability"] for run in ("one", "two")
    )
    assert two.to_numpy() == pytest.approx(one.to_numpy(), abs=1e-6)
    other = dataclasses.replace(config, crm=str(shutil.copytree(workspace.crm, tmp_path / "other")))
    with pytest.raises(InputError, match=r"crm: expected .*, which .*one is boosted from, got .*other"):
        train(other, tmp_path / "three", progress=False)


def test_stage_2_needs_a_trained_stage_1(stage_1: Path, workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="B is zero and frozen, so the gates would get no gradient"):
        workspace.config(stage="2", interaction="full")
    with pytest.raises(InputError, match=r"config.json: expected a JSON file, found none"):
        train(workspace.config(stage="2", start=str(tmp_path / "none"), **GATED), tmp_path / "run")
    shutil.copytree(stage_1, tmp_path / "untrained")
    config = workspace.config()
    task = Task(config, load_inputs(config))
    rellax.save_adapter(task.model, tmp_path / "untrained" / "adapter")
    with pytest.raises(InputError, match=r"B is zero in .*untrained: gates would get no gradient"):
        train(workspace.config(stage="2", start=str(tmp_path / "untrained"), **GATED), tmp_path / "run")
    (tmp_path / "untrained" / "metrics.json").unlink()
    with pytest.raises(InputError, match="expected a finished run, found one that was stopped"):
        train(workspace.config(stage="2", start=str(tmp_path / "untrained"), **GATED), tmp_path / "run")
    second = workspace.root / "second"
    train(workspace.config(stage="2", start=str(stage_1), **GATED), second, progress=False)
    with pytest.raises(InputError, match="expected a run of stage 1, found one of stage 2"):
        train(workspace.config(stage="2", start=str(second), **GATED), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stage_2_takes_over_rank_and_targets(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace.config(r=3, alpha=5, target_modules=("o_proj",)), tmp_path / "one", progress=False)
    config = workspace.config(stage="2", start=str(tmp_path / "one"), interaction="diagonal")
    train(config, tmp_path / "two", progress=False)
    found = read_config(tmp_path / "two")
    assert (found.r, found.alpha, found.target_modules) == (3, 5, ("o_proj",))
    assert adapter(tmp_path / "two")["model.layers.1.self_attn.o_proj.lora_a"].shape == (3, 16)


def test_what_is_trained_begins_as_the_seed_says(workspace: Workspace) -> None:
    def begun(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(99)
        config = workspace.config(stage="joint", seed=seed, **GATED)
        named = Task(config, load_inputs(config)).model.named_parameters()
        return {
            name: p.detach() for name, p in named if name.endswith(("lora_a", "w1", "projector.0.weight"))
        }

    one, again, other = begun(1), begun(1), begun(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_run(stage_1: Path, workspace: Workspace, tmp_path: Path) -> None:
    torch.manual_seed(99)
    train(workspace.config(), tmp_path / "again", progress=False)
    assert_same_run(stage_1, tmp_path / "again")
    train(workspace.config(seed=1), tmp_path / "other", progress=False)
    assert changed(adapter(stage_1), adapter(tmp_path / "other")) == {"lora_a", "lora_b"}


@pytest.mark.parametrize("step", [1, 5, 6, 9])
def test_resume_after_ctrl_c(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped before and after checkpoints and validations, with all kinds of parameters."""
    config = workspace.config(stage="joint", **GATED)
    expected = workspace.root / "joint-whole"
    train(config, expected, progress=False)
    append = runs.Log.append

    def stop(self: runs.Log, **entry: Any) -> None:
        append(self, **entry)
        if entry["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Log, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.json").exists()
    torch.manual_seed(step)
    train(config, tmp_path / "run", progress=False)
    assert_same_run(expected, tmp_path / "run")


@pytest.mark.parametrize("reason", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_stops_a_step_before_its_update_loses_none(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: type[BaseException]
) -> None:
    config = workspace.config(stage="joint", **GATED)
    expected = workspace.root / "joint-whole"
    train(config, expected, progress=False)
    backward = _Trainer._backward

    def stop(self: Any, *rows: Any) -> torch.Tensor:
        if self.step == 5:
            raise reason
        return backward(self, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_backward", stop)
        with pytest.raises(reason):
            train(config, tmp_path / "run", progress=False)
    assert saved_steps(tmp_path / "run") == [4, 5]
    train(config, tmp_path / "run", progress=False)
    assert_same_run(expected, tmp_path / "run")


def test_resume_after_sigkill(workspace: Workspace, tmp_path: Path) -> None:
    """In the middle of a step, with half a checkpoint written, between a validation and its checkpoint."""
    config = workspace.config(stage="joint", validate_every=3, **GATED)
    places = {"step": 8, "checkpoint": 8, "validated": 6}
    killed = [job(config, tmp_path / kill, kill=kill, step=step) for kill, step in places.items()]
    finished = [job(config, tmp_path / name) for name in ("whole", *places)]
    done = launch(killed)
    assert done.returncode == 0, done.stderr
    for kill, last in (("step", 6), ("checkpoint", 6), ("validated", 4)):
        assert not (tmp_path / kill / "metrics.json").exists()
        assert max(saved_steps(tmp_path / kill)) == last
    assert log(tmp_path / "validated")[-1]["step"] == 6
    assert list((tmp_path / "checkpoint" / "checkpoints").glob(".step-*/state.pt"))
    for one in finished:
        run(**one)
    for kill in places:
        assert_same_run(tmp_path / "whole", tmp_path / kill)
        assert not (tmp_path / kill / "checkpoints").exists()


def test_a_stopped_run_goes_on_otherwise_executed(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who stopped it for want of memory keeps what was trained."""
    config = workspace.config(stage="joint", dropout=0.0, **GATED)
    train(config, tmp_path / "whole", progress=False)
    stop(config, tmp_path / "run", 4)
    frugal = dataclasses.replace(config, micro_batch_size=1, gradient_checkpointing=True, compile=True)
    with caplog.at_level(logging.INFO, logger="rellax"):
        train(frugal, tmp_path / "run", progress=False)
    size = f"train: begun with micro_batch_size = {config.micro_batch_size}, goes on with 1: the same but for"
    said = [record.getMessage() for record in caplog.records if "begun with" in record.getMessage()]
    assert len(said) == 3
    assert any(message.startswith(size) for message in said)
    runs_of = [log(tmp_path / name) for name in ("whole", "run")]
    assert runs_of[0][:4] == runs_of[1][:4]
    losses = [[entry["loss"] for entry in of] for of in runs_of]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert read_config(tmp_path / "run") == frugal


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def stop(config: TrainConfig, folder: Path, step: int) -> None:
    """Train until Ctrl-C after the checkpoint of a step."""
    run(**job(config, folder, step=step))


def test_two_checkpoints_are_kept_with_the_best_steps_they_name(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(epochs=4, validate_every=1, checkpoint_every=2)
    stop(config, tmp_path / "run", 12)
    assert saved_steps(tmp_path / "run") == [10, 12]
    checkpoints = tmp_path / "run" / "checkpoints"
    records = [
        json.loads((checkpoints / f"step-{step:06d}/checkpoint.json").read_text()) for step in (10, 12)
    ]
    named = {f"best-{record['best_step']:06d}" for record in records}
    assert {path.name for path in checkpoints.glob("best-*")} == named
    validated = {entry["step"]: entry["validation_auc"] for entry in log(tmp_path / "run")}
    for record, last in zip(records, (10, 12), strict=True):
        assert record["best_step"] == max(range(1, last + 1), key=lambda step: (validated[step], -step))


def test_the_checkpoint_before_has_its_own_best_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 6):
        (checkpoints.best(step) / "adapter").mkdir(parents=True)
        checkpoints.save({"step": step, "best": {"step": step}})
    names = ["best-000004", "best-000006", "step-000004", "step-000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (tmp_path / "step-000006" / "state.pt").write_bytes(b"")
    assert checkpoints.load() == {"step": 4, "best": {"step": 4}}


def test_files_of_others_among_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file manager's is left alone; a folder that a network file system holds on to is removed later."""
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / ".step-000001.0123abcd").mkdir()  # a killed run's

    def save(step: int) -> set[str]:
        checkpoints.save({"step": step, "best": None})
        return {path.name for path in tmp_path.iterdir()}

    assert save(1) == {".DS_Store", "step-000001"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        assert save(2) < save(3) == {".DS_Store", "step-000001", "step-000002", "step-000003"}
    assert save(4) == {".DS_Store", "step-000003", "step-000004"}
    state = checkpoints.load()
    assert state is not None
    assert state["step"] == 4


def busy(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOTEMPTY, "Directory not empty")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no-state", "no-record", "no-best"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = workspace.config(validate_every=3)
    whole = workspace.root / "whole-validated-often"
    train(config, whole, progress=False)
    stop(config, tmp_path / "run", 6)
    last = tmp_path / "run" / "checkpoints" / "step-000006"
    damage_checkpoint(last, damage)
    train(config, tmp_path / "run", progress=False)
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.endswith("; the run goes on from step 4")
    assert str(last.parent) in message
    assert_same_run(whole, tmp_path / "run")


def damage_checkpoint(folder: Path, damage: str) -> None:
    state, record = folder / "state.pt", folder / "checkpoint.json"
    data = state.read_bytes()
    if damage == "truncated":
        state.write_bytes(data[:1000])
    elif damage == "flipped":
        state.write_bytes(data[:-2000] + bytes([data[-2000] ^ 1]) + data[-1999:])
    elif damage == "no-state":
        state.unlink()
    elif damage == "no-record":
        record.unlink()
    else:
        values = json.loads(record.read_text())
        record.write_text(json.dumps(values | {"best_step": 99}))


def test_no_checkpoint_that_is_whole(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = workspace.config(), tmp_path / "run"
    stop(config, folder, 4)
    for path in (folder / "checkpoints").glob("step-*"):
        damage_checkpoint(path, "truncated")
    with pytest.raises(
        InputError,
        match=r"state.pt: expected a checkpoint, but it is damaged, and so is every other; .*--redo",
    ):
        train(config, folder, progress=False)
    shutil.rmtree(folder / "checkpoints")
    with caplog.at_level("INFO"):
        train(config, folder, progress=False)
    assert "no checkpoint, the run begins at its first step" in caplog.text
    train(config, tmp_path / "whole", progress=False)
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_a_full_disk_leaves_the_last_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """No file may grow beyond a limit, which looks like a full disk; the same command then finishes."""
    config, folder = workspace.config(validate_every=4), tmp_path / "run"
    writer = {"checkpoint": "torch.save", "adapter": "rellax.patch.adapter.save"}[what]
    write: Any = {"checkpoint": torch.save, "adapter": adapters.save}[what]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*args: Any) -> Any:
        if saved_steps(folder) == [2]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, limited)
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                train(config, folder, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in cli._MACHINE_SAYS_NO
    assert saved_steps(folder) == [2]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    train(config, folder, progress=False)
    train(config, tmp_path / "whole", progress=False)
    assert_same_run(tmp_path / "whole", folder)


def test_a_run_that_diverges_says_so_and_leaves_its_last_checkpoint(
    workspace: Workspace, tmp_path: Path
) -> None:
    words = r"^lr: expected a rate .*, got loss .* at step 2; begin anew with --redo and a rate below 1e\+10$"
    with pytest.raises(InputError, match=words):
        train(workspace.config(lr=1e10, checkpoint_every=1), tmp_path / "run", progress=False)
    assert saved_steps(tmp_path / "run") == [1]
    state = Checkpoints(tmp_path / "run" / "checkpoints").load()
    assert state is not None
    assert all(tensor.isfinite().all() for tensor in state["parameters"].values())
    config = workspace.config(stage="joint", lr=1e20, validate_every=1, **GATED)
    with pytest.raises(InputError, match=r"^lr: .* validation probabilities that are not numbers after step"):
        train(config, tmp_path / "joint", progress=False)


def test_ctrl_c_while_a_checkpoint_is_written(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage_1: Path
) -> None:
    save, calls = torch.save, iter(range(100))

    def interrupted(*args: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(workspace.config(), tmp_path / "run", progress=False)
    assert saved_steps(tmp_path / "run") == [2, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    train(workspace.config(), tmp_path / "run", progress=False)
    assert_same_run(stage_1, tmp_path / "run")


def test_a_finished_run_is_read_and_another_refused(
    stage_1: Path, workspace: Workspace, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stage_1, run)
    (run / "adapter" / "adapter.safetensors").unlink()  # whatever trained again would write it
    result = train(workspace.config(), run, progress=False)
    assert result == json.loads((stage_1 / "metrics.json").read_text())
    assert not (run / "adapter" / "adapter.safetensors").exists()
    with pytest.raises(InputError, match=r"holds a run with lr = 0.02, expected 0.5; choose another folder"):
        train(workspace.config(lr=0.5), run, progress=False)
    (run / "calibration.json").write_text("{}")
    with pytest.raises(InputError, match="shots: expected 1 to 96 samples"):
        train(workspace.config(shots=9000), run, progress=False, redo=True)
    assert (run / "metrics.json").exists()  # nothing goes until the new run can begin
    train(workspace.config(), run, progress=False, redo=True)
    assert_same_run(stage_1, run)
    assert not (run / "calibration.json").exists()


def test_redo_clears_no_run_of_another_kind(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.crm, tmp_path / "crm")
    with pytest.raises(
        InputError, match=r"crm: expected a run of `rellax train` to begin anew, found another"
    ):
        train(workspace.config(), tmp_path / "crm", progress=False, redo=True)
    assert len(list((tmp_path / "crm").iterdir())) == len(list(workspace.crm.iterdir()))


def test_no_run_is_cleared_for_one_that_starts_from_it(
    stage_1: Path, workspace: Workspace, tmp_path: Path
) -> None:
    run, link = shutil.copytree(stage_1, tmp_path / "run"), tmp_path / "link"
    link.symlink_to(run)
    config = workspace.config(stage="2", start=str(link), **GATED)
    with pytest.raises(InputError, match=r"start: expected another folder than the run's own, got .*link"):
        train(config, run, progress=False, redo=True)
    assert read_config(run) == workspace.config()
    assert adapter(run).keys() == adapter(stage_1).keys()


def test_a_kill_while_a_run_is_cleared(
    stage_1: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, remove = shutil.copytree(stage_1, tmp_path / "run"), shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if path == run / "adapter":
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(workspace.config(), run, progress=False, redo=True)
    with pytest.raises(InputError, match="expected a finished run, found one that was stopped"):
        read_config(run)
    train(workspace.config(), run, progress=False, redo=True)
    assert_same_run(stage_1, run)


def test_one_process_at_a_time_trains_in_a_folder(workspace: Workspace, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        runs.locked(run),
        pytest.raises(InputError, match="run: expected no other process at work there, found one"),
    ):
        train(workspace.config(), run, progress=False)
    assert not run.exists()
    train(workspace.config(), run, progress=False)


def test_a_small_validation_split_is_taken_whole(workspace: Workspace, tmp_path: Path) -> None:
    train(workspace.config(validation_samples=500), tmp_path / "run", progress=False)
    known = Dataset.load(workspace.data).indices("valid")
    assert pq.read_table(tmp_path / "run" / "predictions.parquet")["sample"].to_pylist() == known.tolist()


def test_a_folder_of_something_else_is_left_alone(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "thesis.tex").write_text("all my work")
    with pytest.raises(
        InputError, match="expected a new folder, or that of an earlier run, found other files"
    ):
        train(workspace.config(), tmp_path, progress=False, redo=True)
    assert (tmp_path / "test" / "thesis.tex").exists()


def test_validation_alone_selects_the_step(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(epochs=4, validate_every=3)
    result = train(config, tmp_path / "run", progress=False)
    validated = [entry for entry in log(tmp_path / "run") if "validation_auc" in entry]
    assert [entry["step"] for entry in validated] == [3, 6, 9, 12, 15, 18, 20]
    best = max(validated, key=lambda entry: entry["validation_auc"])  # the first of equals
    assert result["best_step"] == best["step"]
    assert result["selected_by"] == "validation auc"
    assert result["validation"]["auc"] == best["validation_auc"]
    # The adapter is that step's: it gives the same metrics when it is loaded again.
    again = evaluate(tmp_path / "run", split="valid", progress=False)
    assert (again["auc"], again["log_loss"]) == (best["validation_auc"], best["validation_log_loss"])

    by_loss = train(dataclasses.replace(config, select="log_loss"), tmp_path / "loss", progress=False)
    lowest = min(validated, key=lambda entry: entry["validation_log_loss"])
    assert by_loss["best_step"] == lowest["step"]
    assert len({entry["validation_auc"] for entry in validated}) > 1


def test_the_test_split_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    """Flip the labels of all test samples: training stays the same to the last bit."""
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "samples.parquet"
    table = pq.read_table(path)
    is_test = table["split"].to_numpy() == "test"
    labels = np.where(is_test, 1 - table["label"].to_numpy(), table["label"].to_numpy()).astype(np.int8)
    pq.write_table(table.set_column(table.column_names.index("label"), "label", pa.array(labels)), path)
    config = workspace.config(stage="joint", **GATED)
    train(config, tmp_path / "one", progress=False)
    shutil.copytree(workspace.crm, tmp_path / "crm")
    (tmp_path / "crm" / "inputs.json").unlink()  # it would be of other data
    paths = {"data": str(tmp_path / "data"), "crm": str(tmp_path / "crm")}
    train(dataclasses.replace(config, **paths), tmp_path / "two", progress=False)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    one, two = (evaluate(tmp_path / run, progress=False) for run in ("one", "two"))
    assert one["auc"] == pytest.approx(1 - two["auc"])


def test_micro_batches_change_nothing_but_rounding(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(stage="joint", dropout=0.0, epochs=1, lr=1e-3, batch_size=7, **GATED)
    finals = []
    for size in (1, 3, 7):
        train(dataclasses.replace(config, micro_batch_size=size), tmp_path / str(size), progress=False)
        finals.append([entry["loss"] for entry in log(tmp_path / str(size))])
    assert finals[0] == pytest.approx(finals[2], rel=1e-4)
    assert finals[1] == pytest.approx(finals[2], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(stage="joint", epochs=1, **GATED)
    for packing in ("never", "always"):
        runs = [tmp_path / f"{packing}-{on}" for on in (False, True)]
        for on, folder in enumerate(runs):
            changes = {"packing": packing, "gradient_checkpointing": bool(on)}
            train(dataclasses.replace(config, **changes), folder, progress=False)
        assert_same_run(*runs)


def test_compiling_changes_rounding_and_keeps_less(workspace: Workspace, tmp_path: Path) -> None:
    kept, aucs = [], []
    for options in ({}, {"compile": True}):
        config = workspace.config(dtype="bfloat16", dropout=0.0, epochs=1, **options)
        out = tmp_path / f"run{len(kept)}"
        train(config, out, progress=False)
        aucs.append(np.array(pq.read_table(out / "predictions.parquet")["probability"]))
        task = Task(config, load_inputs(config))
        if config.compile:
            rellax.patch.compile_frozen(task.model)
        batch = task.collator.supervised(task.examples([0, 1], "recent"))
        task.model(**batch)  # compiles
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = task.model(**batch).loss
        loss.backward()
        kept.append(sum(sizes.values()))
    assert aucs[1] == pytest.approx(aucs[0], abs=0.02)
    assert kept[1] < 0.9 * kept[0]


def test_a_machine_without_a_compiler(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(InputError, match=r"compile: expected a C\+\+ compiler on this machine, found none"):
        train(workspace.config(compile=True), tmp_path / "run", progress=False)


def test_patience_ends_a_run(workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So large a rate finds nothing better; a stop before the end changes neither where nor why it ends."""
    config = workspace.config(
        epochs=8, lr=0.5, validate_every=2, checkpoint_every=3, patience=3, select="log_loss"
    )
    with caplog.at_level("INFO"):
        result = train(config, tmp_path / "run", progress=False)
    entries = log(tmp_path / "run")
    scores = [(entry["step"], entry["validation_log_loss"]) for entry in entries if "validation_auc" in entry]
    best = min(scores, key=lambda pair: pair[1])[0]
    assert result["best_step"] == best
    assert result["steps"] == best + 6 == entries[-1]["step"] < 40
    reason = f"no better validation log_loss than that of step {best} in 3 validations"
    assert entries[-1]["stopped"] == reason
    assert f"stopped at step {best + 6} of 40: {reason}" in caplog.text
    assert sum("stopped" in entry for entry in entries) == 1
    for step in (3, 6):
        stop(config, tmp_path / str(step), step)
        train(config, tmp_path / str(step), progress=False)
        assert_same_run(tmp_path / "run", tmp_path / str(step))
    patient = dataclasses.replace(config, patience=20)
    assert train(patient, tmp_path / "patient", progress=False)["steps"] == 40


def test_tensorboard_shows_each_step_once(workspace: Workspace, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    run(**job(workspace.config(), folder, step=4, options={"tensorboard": True}))
    train(workspace.config(), folder, tensorboard=True, progress=False)
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False)
    events.Reload()
    for name in ("loss", "lr", "validation_auc"):
        expected = [(entry["step"], entry[name]) for entry in log(folder) if name in entry]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in expected]
    assert len(events.Scalars("loss")) == 10


def test_tensorboard_is_missing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="tensorboard: expected this package, found none; `pip install"):
        train(workspace.config(), tmp_path / "run", tensorboard=True, progress=False)


def test_mixture_has_each_sample_with_either_history(workspace: Workspace) -> None:
    config = workspace.config()
    inputs = load_inputs(config)
    task = Task(config, inputs)
    chosen = inputs.dataset.choose("train", 10, seed=3)
    both = task.examples(chosen, "mixture")
    assert [example.sample for example in both] == np.repeat(chosen, 2).tolist()
    assert list(both[::2]) == list(task.examples(chosen, "recent"))
    assert list(both[1::2]) == list(task.examples(chosen, "retrieved"))
    assert both[::2] != both[1::2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "3"}, "stage: expected one of 1, 2, joint, got '3'"),
        ({"interaction": "full"}, "stage 1 trains plain LoRA"),
        ({"stage": "joint"}, "stage joint trains gates or the soft-prompt projector"),
        ({"start": "x"}, "only stage 2 begins with another run's adapter"),
        ({"prompts": "mixture", "retrieved": None}, "needs the folder of `rellax retrieve`"),
        ({"stage": "joint", "soft_prompt": True, "crm": None}, "need the folder of `rellax crm`"),
        ({"epochs": 0}, "epochs: expected a positive number, got 0"),
        ({"shots": -1}, "shots: expected a positive number or None, got -1"),
        ({"schedule": "step"}, "schedule: expected one of linear, cosine, constant, got 'step'"),
        ({"patience": 0}, "patience: expected a positive number or None, got 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected zero or more, got -0.1"),
        ({"soft_prompt_lr": 0.1}, "soft_prompt_lr: expected None without soft_prompt, got 0.1"),
        ({"crm_logit": True, "crm": None}, "crm: gates, soft prompts and crm_logit need the folder"),
        ({"stage": "joint", "crm_logit": True}, "stage joint trains gates or the soft-prompt projector"),
        (
            {"stage": "joint", **GATED, "crm_logit": True, "loss": "vocab"},
            "loss: expected 'choice' with crm_",
        ),
        ({"recent_share": 1.0}, r"recent_share: expected a fraction in \[0, 1\), got 1.0"),
        (
            {"recent_share": 0.5, "prompts": "recent"},
            "recent_share: expected 0 with prompts='recent', got 0.5",
        ),
        ({"warmup": 1.0}, r"warmup: expected a fraction in \[0, 1\), got 1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_config(workspace: Workspace, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        workspace.config(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shots": 1000}, "shots: expected 1 to 96 samples of split 'train', got 1000"),
        ({"validation_samples": 1}, "have one label and so no AUC"),
        ({"k": 5}, "k: expected at most the 4 behaviours"),
        ({"max_tokens": 20}, "max_tokens: sample"),
        ({"data": "nowhere"}, "nowhere/samples.parquet: expected this file, found none"),
        ({"model": "nowhere"}, "model: expected a folder with a causal language model"),
        ({"target_modules": ("c_attn",)}, "target_modules: expected names out of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_nothing_is_written_on_bad_input(
    workspace: Workspace, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        train(workspace.config(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
