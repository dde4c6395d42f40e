"""The whole stage-2 training step against its floor and the published one: `make bench PYTEST="-k step"`.

A and B are frozen, gates and soft-prompt projector are trained, and a step runs from the prompts' tokens to
the optimiser's update. Before each round of rellax the published step runs on the same batch, and then the
floor: the frozen decoder's forward and backward pass alone, for packed prompts. `over_floor` and `speedup`
are medians of the ratios; on a GPU peak memory is measured too.

SmolLM2-135M reads prompts of MovieLens-100K: the first run fetches and prepares them, in the cache folder. A
random Llama of 7B's shape, on a GPU, needs no file: its prompts are random tokens, as many as K behaviours of
MovieLens-100K take.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from device import DEVICE, wait
from peers.step import FrozenBody, PublishedModel, sharing
from sizes import dry
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from rellax._files import sha256_file
from rellax.ctr.batches import Collator, Example, on_device
from rellax.ctr.llm import checkpoint_activations
from rellax.errors import InputError
from rellax.patch import CFLoRAConfig, SoftPromptConfig, compile_frozen, packing_pays, patch_model

if TYPE_CHECKING:
    from rellax.ctr.config import TrainConfig
    from rellax.ctr.task import Task

BATCH, BATCHES = 8, 4
ITEMS, EMBEDDING = 1682, 64  # MovieLens-100K's items, and the recommendation model's dimensions
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


TINY_LLAMA = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,  # large enough for gradients that are not all small
}


@dataclass(frozen=True)
class Setting:
    """A measurement: behaviours in a prompt, rounds, and a random Llama's shape; None is SmolLM2-135M.

    `tokens` is the mean of a random prompt; the default is MovieLens-100K's with 30 behaviours. Of the three,
    rellax's model alone may have its norms and MLPs `compiled`, or its layers `checkpointed`, computed again
    in the backward pass.
    """

    k: int
    rounds: int
    shape: dict[str, Any] | None = None
    tokens: int = 700
    compiled: bool = False
    checkpointed: bool = False


SETTINGS = {
    "smollm2-135m-k10": Setting(10, 8),
    "smollm2-135m-k10-compiled": Setting(10, 8, compiled=True),
    "smollm2-135m-k30": Setting(30, 5),
}
if DEVICE.type == "cuda":
    large = Setting(30, 10, LLAMA_7B)
    SETTINGS = {
        "llama-7b-k30": large,
        "llama-7b-k30-compiled": replace(large, compiled=True),
        "llama-7b-k30-checkpointed": replace(large, checkpointed=True),
    } | SETTINGS
dry(globals(), BATCH=2, BATCHES=1, SETTINGS={"tiny-llama-k2": Setting(2, 1, TINY_LLAMA, tokens=14)})


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_step(benchmark: Any, setting: Setting) -> None:
    steps, batches = _contest(setting)
    race, cycle = Race(steps, batches), itertools.cycle(batches)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = next(cycle)
        race.run("published", batch)
        race.run("floor", batch)
        return ("rellax", batch), {}

    benchmark.pedantic(race.run, setup=setup, rounds=setting.rounds)
    benchmark.extra_info |= race.results()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_step_parts(benchmark: Any, setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the time of the floor and of the step goes, by operators (self time in the profiler)."""
    steps, batches = _contest(setting)
    parts = {}
    for name in ("floor", "rellax"):
        parts[name] = parts_of(getattr(steps, name), batches[0])
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["parts_ms"] = parts
    with capsys.disabled():
        print(f"\n{'ms':32}{'floor':>10}{'rellax':>10}")
        for part in parts["rellax"]:
            print(f"{part:32}{parts['floor'].get(part, 0):10.1f}{parts['rellax'][part]:10.1f}")


class Steps:
    """Three steps on the same weights, each called with the prompts of a batch.

    Args:
        base: an unpatched model; it is patched in place.
        config: of its updates and gates; loss and the gates' weights are as published instead.
        soft_prompt: its items.
        collator: makes batches; padded or packed is up to the step.
    """

    def __init__(
        self, base: Any, config: CFLoRAConfig, soft_prompt: SoftPromptConfig, collator: Collator
    ) -> None:
        self.device = next(base.parameters()).device
        floor, published = sharing(base), sharing(base)
        config = replace(config, loss="vocab", gate_init="kaiming")
        self.model = patch_model(base, config, soft_prompt=soft_prompt).train()
        for projection in self.model.rellax.projections.values():
            torch.nn.init.normal_(projection.lora_b, std=0.02)  # as if stage 1 had trained it
        self.model.rellax.set_trainable(lora=False)
        self.published_model = PublishedModel(published, self.model).train()
        self.body = FrozenBody(floor)
        self.collator = replace(collator, packed=packing_pays(self.model))
        self.optimisers = [
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, weight_decay=0.0)
            for model in (self.model, self.published_model)
        ]

    def floor(self, examples: Sequence[Example]) -> None:
        batch = self._batch(replace(self.collator, packed=True), examples)
        self.body(*(batch[name] for name in ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")))

    def rellax(self, examples: Sequence[Example]) -> None:
        _descend(self.rellax_loss(examples), self.optimisers[0])

    def published(self, examples: Sequence[Example]) -> None:
        _descend(self.published_loss(examples), self.optimisers[1])

    def rellax_loss(self, examples: Sequence[Example]) -> Tensor:
        loss: Tensor = self.model(**self._batch(self.collator, examples)).loss
        return loss

    def published_loss(self, examples: Sequence[Example]) -> Tensor:
        loss: Tensor = self.published_model(**self._batch(replace(self.collator, packed=False), examples))
        return loss

    def _batch(self, collator: Collator, examples: Sequence[Example]) -> dict[str, Any]:
        return on_device(collator.supervised(examples), self.device)


class Race:
    """Rounds of the three steps on the same batches, which all have warmed up on one of two prompts."""

    def __init__(self, steps: Steps, batches: Sequence[Sequence[Example]]) -> None:
        self.steps, self.batches = steps, batches
        self.seconds: dict[str, list[float]] = {"floor": [], "rellax": [], "published": []}
        self.peaks: dict[str, int] = dict.fromkeys(self.seconds, 0)
        for name in self.seconds:
            self.run(name, batches[0][:2])
            self.seconds[name].clear()

    def run(self, name: str, batch: Sequence[Example]) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        _run(getattr(self.steps, name), batch)
        self.seconds[name].append(time.perf_counter() - start)
        if DEVICE.type == "cuda":  # the models' weights, which all three share, are counted too
            self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated())

    def results(self) -> dict[str, float]:
        """Median seconds and ratios; tokens of a batch, and the share of padding where it is padded."""
        floor, rellax, published = self.seconds.values()
        lengths = [[len(example.input_ids) + 1 for example in batch] for batch in self.batches]
        found = {
            "floor_s": statistics.median(floor),
            "rellax_s": statistics.median(rellax),
            "published_s": statistics.median(published),
            "over_floor": _median_ratio(rellax, floor),
            "speedup": _median_ratio(published, rellax),
            "tokens": statistics.mean(map(sum, lengths)),
            "padding": 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths),
        }
        if DEVICE.type == "cuda":
            found |= {f"{name}_peak_bytes": peak for name, peak in self.peaks.items()}
            found["memory"] = self.peaks["rellax"] / self.peaks["published"]
        return found


def _median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _contest(setting: Setting) -> tuple[Steps, list[list[Example]]]:
    """The three steps, and batches of prompts with K behaviours."""
    gc.collect()  # models of an earlier setting would count as memory of this one
    torch.manual_seed(0)
    if setting.shape is None:
        given, examples = _loaded(setting.k)
    else:
        given, examples = synthetic(setting, BATCH * BATCHES, torch.bfloat16, DEVICE)
    steps = Steps(*given)
    if setting.compiled:
        compile_frozen(steps.model)
    if setting.checkpointed:
        checkpoint_activations(steps.model)
    return steps, [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]


Given = tuple[Any, CFLoRAConfig, SoftPromptConfig, Collator]
"""What `Steps` takes."""


def synthetic(
    setting: Setting, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[Given, list[Example]]:
    """A random Llama, and `count` prompts of random tokens, each with a placeholder per behaviour and target.

    Lengths are uniform within a seventh of their mean, which pads a batch of 8 by the tenth that
    MovieLens-100K's prompts take. The placeholder is the first id after the vocabulary.
    """
    assert setting.shape is not None
    llama = LlamaConfig(**setting.shape)
    with device:
        base = AutoModelForCausalLM.from_config(llama, dtype=dtype)
    placeholder, behaviours = llama.vocab_size, setting.k + 1
    spread = setting.tokens // 7
    lengths = torch.randint(setting.tokens - spread, setting.tokens + spread + 1, (count,)).tolist()
    examples = []
    for sample, length in enumerate(lengths):
        ids = torch.randint(llama.vocab_size, (length,))
        ids[torch.randperm(length)[:behaviours]] = placeholder
        items = torch.randint(ITEMS, (behaviours,))
        examples.append(Example(sample, sample % 2, ids.tolist(), items.tolist()))
    no, yes = torch.randperm(llama.vocab_size)[:2].tolist()
    collator = Collator(0, (no, yes), torch.randn(count, EMBEDDING), soft_prompt=True)
    config = CFLoRAConfig(cond_dim=EMBEDDING, answer_ids=(no, yes))
    return (base, config, SoftPromptConfig(torch.randn(ITEMS, EMBEDDING), (placeholder,)), collator), examples


def _loaded(k: int) -> tuple[Given, list[Example]]:
    """SmolLM2-135M, and prompts of random training samples of MovieLens-100K."""
    from rellax.ctr.llm import load_model
    from rellax.ctr.task import Task, load_inputs

    config = _prepared(k)
    task = Task(config, load_inputs(config))
    samples, chosen = task.inputs.dataset.samples, task.inputs.dataset.choose("train", None, 0)
    chosen = chosen[samples.position[chosen] >= k]
    order = torch.randperm(len(chosen))[: BATCH * BATCHES].tolist()
    base = load_model(config.model, dtype="bfloat16").to(DEVICE)
    return of_task(task, base), list(task.examples(chosen[order], "recent"))


def of_task(task: Task, base: Any) -> Given:
    """The configuration, items and batches of a run, for its model unpatched."""
    soft_prompt = task.model.rellax.soft_prompt
    items = SoftPromptConfig(soft_prompt.item_embeddings, tuple(soft_prompt.placeholder_ids.tolist()))
    return base, task.model.rellax.config, items, task.collator


def _prepared(k: int) -> TrainConfig:
    """A run on the embedded data and model, with a classical recommender of one short epoch.

    Made once, and anew where what makes the files has changed.
    """
    from rellax.ctr import assets
    from rellax.ctr.config import CRMConfig, TrainConfig
    from rellax.ctr.crm import train_crm
    from rellax.ctr.dataset import Dataset
    from rellax.ctr.prepare import prepare
    from rellax.ctr.sources import read_ml_100k

    logging.basicConfig(format="%(message)s")
    logging.getLogger("rellax").setLevel(logging.INFO)
    try:
        raw, model = assets.movielens_100k(), assets.smollm2_135m()
    except InputError as error:  # without a network
        pytest.skip(str(error))
    makers = "".join(sha256_file(inspect.getfile(maker)) for maker in (prepare, Dataset, train_crm))
    folder = assets.cache_folder() / f"benchmark-{hashlib.sha256(makers.encode()).hexdigest()[:8]}"
    if not (folder / "data" / "dataset.json").exists():
        prepare(read_ml_100k(raw), folder / "data")
    if not (folder / "crm" / "outputs.safetensors").exists():
        train_crm(Dataset.load(folder / "data"), folder / "crm", CRMConfig(shots=4096, epochs=1))
    return TrainConfig(
        data=str(folder / "data"),
        model=str(model),
        crm=str(folder / "crm"),
        stage="joint",
        interaction="full",
        soft_prompt=True,
        prompts="recent",
        k=k,
        max_tokens=4096,
    )


def _descend(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
    optimiser.step()
    optimiser.zero_grad()


def _run(step: Callable[[Sequence[Example]], None], batch: Sequence[Example]) -> None:
    step(batch)
    wait()


PARTS = {
    "rellax operators": ("rellax",),
    "attention": ("scaled_dot_product", "varlen", "_Segments", "aten::bmm", "aten::_softmax"),
    "products": ("aten::mm", "aten::addmm"),
    "optimiser and clip": ("Optimizer", "aten::_foreach", "aten::lerp", "aten::addc", "norm_"),
}
"""What the names of a part's operators contain; on a CPU, `aten::bmm` occurs in attention alone."""


def parts_of(step: Callable[[Sequence[Example]], None], batch: Sequence[Example]) -> dict[str, float]:
    """Milliseconds by part of a step, of the device's own time."""
    step(batch)
    activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if DEVICE.type == "cuda" else "CPU")
    with torch.profiler.profile(activities=[activity]) as profile:
        _run(step, batch)
    parts = dict.fromkeys([*PARTS, "norms, activations, copies"], 0.0)
    field = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    for event in profile.key_averages():
        part = next((part for part, names in PARTS.items() if any(name in event.key for name in names)), None)
        parts[part or "norms, activations, copies"] += getattr(event, field) / 1e3
    return parts | {"in all": sum(parts.values())}
