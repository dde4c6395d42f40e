"""Evaluation: probabilities that padding does not change, results that belong to their inputs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import GATED, Workspace

from rellax._files import read_json, sha256_file, write_json
from rellax.ctr import evaluate as evaluation
from rellax.ctr import metrics
from rellax.ctr.batches import Example
from rellax.ctr.checkpoints import Checkpoints
from rellax.ctr.config import read_config
from rellax.ctr.dataset import Dataset
from rellax.ctr.evaluate import evaluate, evaluate_share, evaluate_zero_shot, predict_probabilities
from rellax.ctr.predictor import Predictor
from rellax.ctr.retrieval import embeddings_folder, read_positions
from rellax.ctr.task import Task, input_hashes, load_inputs
from rellax.ctr.train import train
from rellax.errors import InputError
from rellax.patch import save_adapter


@pytest.mark.parametrize("gated", [False, True], ids=["lora", "gates-and-soft-prompts"])
def test_padding_never_changes_a_prediction(workspace: Workspace, gated: bool) -> None:
    config = workspace.config(stage="joint", **GATED) if gated else workspace.config()
    inputs = load_inputs(config)
    task = Task(config, inputs)
    for name, parameter in task.model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    examples = []
    for sample in inputs.dataset.indices("test"):
        prompt = task.prompts.build(sample, inputs.retrieved[sample, : sample % 4])
        examples.append(Example(int(sample), 1, prompt.input_ids, prompt.item_ids))
    lengths = [len(example.input_ids) for example in examples]
    assert max(lengths) > min(lengths) + 15
    alone = predict_probabilities(task.model, task.collator, examples, batch_size=1)
    assert alone.std() > 0.01
    for batch_size in (4, len(examples)):
        batched = predict_probabilities(task.model, task.collator, examples, batch_size=batch_size)
        assert batched == pytest.approx(alone, abs=2e-6)


def test_nothing_is_dropped_from_what_is_scored(workspace: Workspace) -> None:
    """Whatever mode the model comes in, such as that of training, whose validations score as well."""
    config = workspace.config(dropout=0.5)
    inputs = load_inputs(config)
    task = Task(config, inputs)
    for name, parameter in task.model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    examples = task.examples(inputs.dataset.indices("test"), "recent")
    expected = predict_probabilities(task.model.eval(), task.collator, examples)
    found = predict_probabilities(task.model.train(), task.collator, examples)
    assert found.tolist() == expected.tolist()
    assert not task.model.training


def test_scoring_projects_each_item_once_and_keeps_nothing_for_gradients(workspace: Workspace) -> None:
    config = workspace.config(stage="joint", **GATED)
    inputs = load_inputs(config)
    task = Task(config, inputs)
    soft_prompt, projected, modes = task.model.rellax.soft_prompt, [], []
    soft_prompt.projector.register_forward_pre_hook(lambda _, args: projected.append(args[0].shape[0]))
    task.model.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    examples = task.examples(inputs.dataset.indices("test"), "recent")
    first = predict_probabilities(task.model, task.collator, examples, batch_size=4)
    assert projected == [len(inputs.item_embeddings)]
    assert len(modes) == -(-len(examples) // 4)
    assert all(modes)

    task.model.train()  # a training step in between: its weights are what the next scores are made with
    loss = task.model(**task.collator.supervised(examples[:4])).loss
    loss.backward()
    with torch.no_grad():
        for parameter in soft_prompt.projector.parameters():
            parameter.add_(parameter.grad, alpha=-10 / parameter.grad.norm())
    second = predict_probabilities(task.model, task.collator, examples, batch_size=4)
    assert projected[-1] == projected[0]
    assert abs(second - first).max() > 1e-4


def test_zero_shot_is_the_model_as_it_is(workspace: Workspace, tmp_path: Path) -> None:
    config = workspace.config(prompts="recent", k=2)
    result = evaluate_zero_shot(config, tmp_path / "zero", samples=7, seed=5, progress=False)
    table = pq.read_table(tmp_path / "zero" / "predictions.parquet")
    inputs = load_inputs(config)
    chosen = inputs.dataset.choose("test", 7, 5)
    assert table["sample"].to_pylist() == chosen.tolist()
    found = (table[name].to_numpy() for name in ("label", "probability"))
    expected = metrics.evaluate(*found, inputs.dataset.samples.user[chosen], seed=5)
    assert result == {"split": "test"} | expected

    task = Task(config, inputs)
    original = AutoModelForCausalLM.from_pretrained(workspace.model, dtype=torch.float32)
    no, yes = task.collator.answer_ids
    for row in table.to_pylist():
        (example,) = task.examples([row["sample"]], "recent")
        with torch.no_grad():
            logits = original(torch.tensor([example.input_ids])).logits[0, -1].double()
        assert row["probability"] == pytest.approx(torch.sigmoid(logits[yes] - logits[no]).item(), abs=1e-6)
        assert row["label"] == inputs.dataset.samples.label[row["sample"]]


def test_evaluation_needs_the_files_of_training(workspace: Workspace, tmp_path: Path) -> None:
    stage_1 = tmp_path / "stage-1"
    train(workspace.config(), stage_1, progress=False)
    result = evaluate(stage_1, samples=6, folder=tmp_path / "test", progress=False)
    assert result == evaluate(stage_1, samples=6, folder=tmp_path / "test", progress=False)
    with pytest.raises(InputError, match="holds a run with samples = 6, expected 5"):
        evaluate(stage_1, samples=5, folder=tmp_path / "test", progress=False)
    words = "samples = 6, expected 7, and seed = 0, expected 1; remove this folder to score anew"
    with pytest.raises(InputError, match=f"holds a run with {words}"):
        evaluate(stage_1, samples=7, seed=1, folder=tmp_path / "test", progress=False)
    with pytest.raises(InputError, match="samples: expected 1 to 12 samples of split 'test', got 99"):
        evaluate(stage_1, samples=99, folder=tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    assert evaluate(stage_1, samples=99, at_most=True, progress=False)["samples"] == 12

    shutil.copytree(workspace.data, tmp_path / "data")
    train(workspace.config(data=str(tmp_path / "data")), tmp_path / "other", progress=False)
    meta = tmp_path / "data" / "dataset.json"
    write_json(meta, read_json(meta) | {"question": "Would they?"})
    with pytest.raises(InputError, match=r"files it was trained with, but dataset.json changed since"):
        evaluate(tmp_path / "other", progress=False)

    shutil.copytree(workspace.retrieved, tmp_path / "retrieved")
    train(workspace.config(retrieved=str(tmp_path / "retrieved")), tmp_path / "run", progress=False)
    path = tmp_path / "retrieved" / "retrieved.parquet"
    pq.write_table(pq.read_table(path), path, compression="none")
    with pytest.raises(InputError, match=r"files it was trained with, but retrieved.parquet changed since"):
        evaluate(tmp_path / "run", progress=False)


def test_a_run_finds_what_it_reads_wherever_both_are(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with paths as the command line has them; then read from elsewhere, copied, and moved."""
    names = ("data", "retrieved", "model", "crm", "embeddings")
    for name in names:
        shutil.copytree(workspace.root / name, tmp_path / "a" / "work" / name)
    monkeypatch.chdir(tmp_path / "a")
    paths = {name: f"work/{name}" for name in names[:4]}
    train(workspace.config(**paths), "work/run", progress=False)
    assert read_config("work/run").data == "work/data"
    expected = evaluate("work/run", progress=False)
    scored = Path("work/run/test/predictions.parquet").stat().st_mtime_ns

    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    assert evaluate(tmp_path / "a/work/run", folder=tmp_path / "one", progress=False) == expected
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = read_config("b/work/run")
    assert {name: getattr(copied, name) for name in names[:4]} == {
        name: str(tmp_path / "b/work" / name) for name in names[:4]
    }
    shutil.rmtree("b/work/data")
    assert read_config("b/work/run").data == str(tmp_path / "a/work/data")
    Path("a").rename("c")
    assert evaluate("c/work/run", folder=tmp_path / "two", progress=False) == expected
    assert evaluate("c/work/run", progress=False) == expected
    assert Path("c/work/run/test/predictions.parquet").stat().st_mtime_ns == scored
    assert embeddings_folder(read_config("c/work/run").retrieved) == tmp_path / "c/work/embeddings"


def test_every_file_that_decides_what_a_run_computes_is_noted(workspace: Workspace, tmp_path: Path) -> None:
    adapter = tmp_path / "one" / "adapter" / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"of stage 1")
    names = ("items", "users", "behaviours", "samples")
    data = [workspace.data / "dataset.json", *(workspace.data / f"{name}.parquet" for name in names)]
    others = [
        workspace.retrieved / "retrieved.parquet",
        workspace.embeddings / "embeddings.safetensors",
        workspace.crm / "model.safetensors",
        workspace.crm / "outputs.safetensors",
        adapter,
    ]
    config = workspace.config(stage="2", start=str(tmp_path / "one"), **GATED)
    assert input_hashes(config) == {path.name: sha256_file(path) for path in [*data, *others]}
    alone = workspace.config(prompts="recent", retrieved=None, crm=None)
    assert input_hashes(alone) == {path.name: sha256_file(path) for path in data}
    adapter.unlink()
    with pytest.raises(InputError, match="expected this file, found none; `rellax train` makes it"):
        input_hashes(config)


def test_a_run_needs_the_weights_that_it_was_trained_on(workspace: Workspace, tmp_path: Path) -> None:
    """Wherever these lie now, in whatever dtype, and whatever else has been done to the folder."""
    folder, run = shutil.copytree(workspace.model, tmp_path / "model"), tmp_path / "run"
    config = workspace.config(model=str(folder))
    train(config, run, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "README.md").write_text("A model.")
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    known = evaluate(run, samples=3, folder=tmp_path / "known", progress=False)
    Predictor(run)
    earlier = shutil.copytree(run, tmp_path / "earlier")

    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.01
    model.save_pretrained(folder)
    words = f"model: expected the weights that {run / 'adapter'} was trained on, found others in {folder}$"
    for needs_them in (
        lambda: evaluate(run, samples=3, progress=False),
        lambda: Predictor(run),
        lambda: train(
            workspace.config(model=str(folder), stage="2", start=str(run), **GATED),
            tmp_path / "stage-2",
            progress=False,
        ),
    ):
        with pytest.raises(InputError, match=words):
            needs_them()
    assert evaluate(run, samples=3, folder=tmp_path / "known", progress=False) == known

    path = earlier / "adapter" / "adapter.json"  # of a version that noted nothing
    write_json(path, {name: value for name, value in read_json(path).items() if name != "base_weights"})
    evaluate(earlier, samples=3, progress=False)


def test_a_stopped_training_needs_the_weights_that_it_began_with(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(workspace.model, tmp_path / "model")
    config = workspace.config(model=str(folder), checkpoint_every=1)

    def stop(self: Checkpoints, state: dict[str, Any]) -> None:
        save(self, state)
        raise KeyboardInterrupt

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 1.1
    model.save_pretrained(folder)
    with pytest.raises(
        InputError, match=r"model: expected the weights that .*run was begun with, found others"
    ):
        train(config, tmp_path / "run", progress=False)


def test_a_run_needs_the_tokens_that_it_was_trained_with(workspace: Workspace, tmp_path: Path) -> None:
    folder, run = shutil.copytree(workspace.model, tmp_path / "model"), tmp_path / "run"
    train(workspace.config(model=str(folder), stage="joint", epochs=1, **GATED), run, progress=False)
    other = shutil.copytree(run, tmp_path / "other") / "adapter" / "adapter.json"
    description = read_json(other)
    write_json(other, description | {"config": description["config"] | {"answer_ids": [1, 2]}})
    words = r"model: expected the tokenizer that .* was trained with, its tokens \[1, 2, "
    with pytest.raises(InputError, match=words):
        Predictor(other.parents[1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<another>"])  # it takes the id that the placeholder would get
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        InputError, match=r"model: expected the tokenizer that .* was trained with, its tokens"
    ):
        Predictor(run)


def test_a_stopped_evaluation_goes_on_and_a_finished_one_grows(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def counted(model: object, collator: object, examples: list, **options: object) -> np.ndarray:
        if len(scored) == stop_after:
            raise KeyboardInterrupt
        scored.append(len(examples))
        return predict_probabilities(model, collator, examples, **options)

    monkeypatch.setattr(evaluation, "predict_probabilities", counted)
    monkeypatch.setattr(evaluation, "_AT_ONCE", 4)
    config = workspace.config(prompts="recent", k=2)

    def table(name: str, samples: int | None) -> list[dict]:
        result = evaluate_zero_shot(config, tmp_path / name, samples=samples, seed=2, progress=False)
        assert result == read_json(tmp_path / name / "metrics.json")
        assert not [entry for entry in (tmp_path / name).iterdir() if entry.name.startswith(".")]
        return pq.read_table(tmp_path / name / "predictions.parquet").to_pylist()

    stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        table("stopped", 10)
    assert [entry.name for entry in (tmp_path / "stopped").iterdir()] == [".part"]
    stop_after = -1
    stopped = table("stopped", 10)
    assert scored == [4, 4, 2]  # the last two alone, then at once
    assert stopped == table("at-once", 10)

    scored.clear()
    grown = table("stopped", None)
    assert scored == [2]  # of 12 that there are
    assert len(grown) == 12
    assert [row for row in grown if row in stopped] == stopped

    # How a run is executed is no part of what it found; what it is given is.
    config = workspace.config(prompts="recent", k=2, micro_batch_size=1, packing="never")
    scored.clear()
    assert table("stopped", None) == table("at-once", None) == grown
    assert scored == [2]
    config = workspace.config(prompts="recent", k=3)
    with pytest.raises(InputError, match=r"holds a run with run\.k = 2, expected 3; remove this folder"):
        table("stopped", None)
    config = workspace.config(prompts="recent", k=2)

    # What other prompts were given, or another model, is no part of it.
    stop_after = len(scored) + 1
    with pytest.raises(KeyboardInterrupt):
        table("other", 10)
    stop_after, config = -1, workspace.config(prompts="recent", k=3)
    scored.clear()
    assert table("other", 10) == table("other-at-once", 10)
    assert scored == [4, 4, 2] * 2


def test_a_result_grows_from_one_of_the_same_split_adapter_and_files_alone(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = shutil.copytree(workspace.data, tmp_path / "data")
    config = workspace.config(data=str(data), prompts="recent", retrieved=None, crm=None, epochs=1)
    run, found = tmp_path / "run", tmp_path / "found"
    train(config, run, progress=False)
    evaluate(run, samples=3, folder=found, progress=False)
    with pytest.raises(InputError, match="holds a run with split = test, expected valid"):
        evaluate(run, split="valid", samples=5, folder=found, progress=False)
    task = Task(config, load_inputs(config), run / "adapter")
    with torch.no_grad():
        for projection in task.model.rellax.projections.values():
            projection.lora_b.mul_(2)
    save_adapter(task.model, run / "adapter")
    with pytest.raises(InputError, match="holds a run with adapter = "):
        evaluate(run, samples=5, folder=found, progress=False)

    evaluate_zero_shot(config, tmp_path / "zero", samples=3, progress=False)
    write_json(data / "dataset.json", read_json(data / "dataset.json") | {"question": "Would they?"})
    with pytest.raises(InputError, match=r"holds a run with .*other contents of dataset.json"):
        evaluate_zero_shot(config, tmp_path / "zero", samples=5, progress=False)


def test_so_many_prompts_are_scored_at_once(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the validations of training; a run that was too large for that goes on with fewer."""
    sizes: list[int] = []
    scoring_batches = evaluation.scoring_batches

    def noted(lengths: Sequence[int], size: int) -> list[np.ndarray]:
        sizes.append(size)
        if size > 5:
            raise torch.OutOfMemoryError
        return scoring_batches(lengths, size)

    monkeypatch.setattr(evaluation, "scoring_batches", noted)
    config = workspace.config(epochs=1)
    with pytest.raises(torch.OutOfMemoryError):
        train(config, tmp_path / "run", progress=False)
    config = dataclasses.replace(config, eval_batch_size=5)
    train(config, tmp_path / "run", progress=False)
    evaluate(tmp_path / "run", samples=6, progress=False)
    evaluate(tmp_path / "run", samples=8, batch_size=2, progress=False)
    evaluate_zero_shot(dataclasses.replace(config, eval_batch_size=3), tmp_path / "zero", progress=False)
    assert sizes == [16, 5, 5, 2, 3]
    with pytest.raises(InputError, match=r"^batch_size: expected a positive number or None, got 0$"):
        evaluate(tmp_path / "run", batch_size=0)


def test_placeholders_and_items_must_match(workspace: Workspace) -> None:
    config = workspace.config(stage="joint", **GATED)
    task = Task(config, load_inputs(config))
    (example,) = task.examples([3], "recent")
    short = Example(3, 1, example.input_ids, example.item_ids[:-1])
    with pytest.raises(InputError, match=r"item_ids: .*placeholder"):
        predict_probabilities(task.model, task.collator, [short])


def test_retrieved_prompts_with_recent_behaviours(workspace: Workspace) -> None:
    config = workspace.config(recent_share=0.7)
    inputs = load_inputs(config)
    task, dataset = Task(config, inputs), inputs.dataset
    chosen = dataset.indices("test")
    recent, retrieved = task.examples(chosen, "mixture")[:2], task.examples(chosen, "retrieved")
    differ = 0
    for sample, example in zip(chosen, retrieved, strict=True):
        end = int(dataset.samples.position[sample])
        nearest = [int(position) for position in inputs.retrieved[sample] if 0 <= position < end - 2]
        positions = [end - 1, end - 2, *nearest[:1]]  # 0.7 of 3
        assert example.input_ids == task.prompts.build(int(sample), positions).input_ids
        differ += nearest[:1] != [end - 3]
    assert differ  # some are not the last three
    assert recent[0].input_ids == task.examples(chosen[:1], "recent")[0].input_ids
    assert recent[1].input_ids == retrieved[0].input_ids
    lengths = [len(example.input_ids) for example in retrieved]
    assert retrieved.lengths(np.arange(len(chosen))).tolist() == lengths


@pytest.mark.parametrize("kind", ["recent", "retrieved", "both"])
def test_the_share_of_liked_behaviours(workspace: Workspace, tmp_path: Path, kind: str) -> None:
    dataset = Dataset.load(workspace.data)
    dataset.meta["unrated"] = 1.0  # what such a rating says does not count
    retrieved = None if kind == "recent" else workspace.retrieved
    options = {"retrieved": retrieved, "recent_behaviours": 1 if kind == "both" else 0, "seed": 4}
    result = evaluate_share(dataset, tmp_path / "share", k=3, **options)
    table = pq.read_table(tmp_path / "share" / "predictions.parquet")
    assert table["label"].to_numpy().tolist() == dataset.samples.label.tolist()
    assert table["sample"].to_numpy().tolist() == list(range(len(dataset.samples)))
    found, positions = table["probability"].to_numpy(), read_positions(workspace.retrieved, dataset, 3)
    for sample in range(0, len(found), 7):
        ratings = dataset.behaviour_ratings[dataset.history(sample)]
        last, near = len(ratings) - 1, [p for p in positions[sample] if p >= 0]
        if kind == "both":
            near = [last, *(p for p in near if p != last)][:3] if len(ratings) else []
        shown = ratings[-3:] if kind == "recent" else ratings[near]
        shown = shown[shown != 1.0]
        expected = ((shown > dataset.meta["positive_above"]).sum() + 1) / (len(shown) + 2)
        assert found[sample] == pytest.approx(expected)
    for split in ("valid", "test"):
        of = dataset.indices(split)
        labels, users = dataset.samples.label[of], dataset.samples.user[of]
        assert result[split] == metrics.evaluate(labels, found[of], users, seed=4)
    assert evaluate_share(dataset, tmp_path / "share", k=3, **options) == result
    with pytest.raises(InputError, match="holds a run with k = 3, expected 2"):
        evaluate_share(dataset, tmp_path / "share", k=2, **options)
