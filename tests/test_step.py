"""The benchmark of the training step: the peers compute what rellax computes, and every path of it runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from workspace import GATED, Workspace

from rellax.ctr.evaluate import predict_probabilities
from rellax.ctr.llm import load_model
from rellax.ctr.task import Task, load_inputs

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_step

RANDOM = bench_step.Setting(k=3, rounds=1, shape=bench_step.TINY_LLAMA, tokens=30)


def contest(workspace: Workspace | None, **changes: Any) -> tuple[Any, list[Any]]:
    """The steps for a tiny model, in fp32, and two batches; without a workspace nothing is read."""
    torch.manual_seed(0)
    if workspace is None:
        given, examples = bench_step.synthetic(RANDOM, 6, torch.float32, torch.device("cpu"))
    else:
        config = workspace.config(stage="joint", prompts="recent", **GATED)
        task = Task(config, load_inputs(config))
        given = bench_step.of_task(task, load_model(workspace.model, dtype="float32"))
        examples = list(task.examples(task.inputs.dataset.choose("train", 6, 0), "recent"))
    base, lora, *rest = given
    return bench_step.Steps(base, replace(lora, **changes), *rest), [examples[:4], examples[4:]]


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "random"])
def test_published_step_has_our_loss_and_gradients(workspace: Workspace, loaded: bool) -> None:
    steps, batches = contest(workspace if loaded else None, dropout=0.0)
    for batch in batches:
        ours, published = steps.rellax_loss(batch), steps.published_loss(batch)
        assert_close(ours, published)
        bank, projector = steps.model.rellax.gate_bank, steps.model.rellax.soft_prompt.projector
        gates = [layer.gate.parameters() for layer in steps.published_model.adapted]
        mine = torch.autograd.grad(ours, [*bank.parameters(), *projector.parameters()])
        theirs = torch.autograd.grad(
            published,
            [
                *(p for gate in zip(*gates, strict=True) for p in gate),
                *steps.published_model.projector.parameters(),
            ],
        )
        layers = len(steps.published_model.adapted)
        for index, gradient in enumerate(mine[:6]):
            assert gradient.abs().max() > 1e-5
            assert_close(
                gradient, torch.stack(theirs[index * layers : (index + 1) * layers]), rtol=1e-3, atol=1e-6
            )
        for gradient, expected in zip(mine[6:], theirs[6 * layers :], strict=True):
            assert gradient.abs().max() > 1e-5
            assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_published_prediction_has_our_probabilities(workspace: Workspace) -> None:
    steps, batches = contest(workspace, dropout=0.0)
    for batch in batches:
        prompts = replace(steps.collator, packed=False).prompts(batch)
        found = steps.published_model.probabilities(**prompts, answer_ids=steps.collator.answer_ids)
        ours = predict_probabilities(steps.model, steps.collator, batch)
        assert found.numpy() == pytest.approx(ours, abs=2e-6)


def test_a_race_of_a_random_llama() -> None:
    """The path of the 7B-shaped Llama, with its weights smaller."""
    steps, batches = contest(None)
    model = steps.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    race = bench_step.Race(steps, batches)
    for batch in batches:
        for name in race.seconds:
            race.run(name, batch)
    results = race.results()
    assert results["tokens"] == sum(len(e.input_ids) + 1 for batch in batches for e in batch) / 2
    assert 0 < results["padding"] < 1
    assert all(results[name] > 0 for name in ("floor_s", "over_floor", "speedup"))
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(("rellax.gate_bank", "rellax.soft_prompt")) for name in changed)


def test_parts_of_a_step_add_up(workspace: Workspace) -> None:
    steps, batches = contest(workspace)
    parts = bench_step.parts_of(steps.rellax, batches[0])
    assert parts["in all"] == pytest.approx(sum(parts.values()) / 2)
    assert min(parts[name] for name in bench_step.PARTS) > 0
