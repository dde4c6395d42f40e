"""CFLoRA as a method of PEFT: what it computes, and that gates follow PEFT's names, switches and files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_patch import CHECKPOINTS, close, set_checkpointing, snapshot
from tiny_models import LAYOUTS

from rellax.errors import InputError
from rellax.patch import save_adapter
from rellax.patch.peft import CFLoraConfig


def config(**options: Any) -> CFLoraConfig:
    defaults: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": list(tiny.TARGETS),
        "task_type": "CAUSAL_LM",
        "cond_dim": tiny.COND,
        "gate_init": "kaiming",
        "loss": "choice",
        "answer_ids": (tiny.NO, tiny.YES),
    }
    return CFLoraConfig(**defaults | options)


def made(name: str = "default", seed: int = 2, **options: Any) -> Any:
    """A model with random A, B and gates."""
    model = get_peft_model(tiny.base_model(), config(**options), adapter_name=name)
    tiny.randomise(model, seed)
    return model


def batch(layout: str = "right") -> dict[str, Any]:
    return tiny.batch(tiny.instances(placeholders=False), layout)


def loss(model: Any) -> torch.Tensor:
    return model(**batch()).loss


def file_of(folder: Path, name: str = "default") -> Path:
    return (folder if name == "default" else folder / name) / "adapter_model.safetensors"


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interaction", ["full", "diagonal"])
def test_it_computes_what_a_patched_model_does(interaction: str, layout: str, kind: str) -> None:
    theirs = made("some", interaction=interaction)
    ours = tiny.patched(tiny.base_model(), soft_prompt=False, interaction=interaction)
    pairs = {}
    for name, projection in ours.rellax.projections.items():
        layer = theirs.get_base_model().get_submodule(name)
        pairs[f"{name}.lora_a"] = projection.lora_a, layer.lora_A["some"].weight
        pairs[f"{name}.lora_b"] = projection.lora_b, layer.lora_B["some"].weight
    for name, parameter in ours.rellax.gate_bank.named_parameters():
        pairs[name] = parameter, theirs.rellax.active_bank().get_parameter(name)
    with torch.no_grad():
        for own, other in pairs.values():
            own.copy_(other)
    for model in (ours, theirs.get_base_model()):
        set_checkpointing(model, kind)
    out, expected = theirs(**batch(layout)), ours(**batch(layout))
    close(out.loss, expected.loss)
    close(out.answer_logits, expected.answer_logits)
    out.loss.backward()
    expected.loss.backward()
    for own, other in pairs.values():
        close(other.grad, own.grad)


def test_what_is_trained(tmp_path: Path) -> None:
    model = made()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_A." in n or ".lora_B." in n or ".lora_gates." in n for n in trained)
    assert len(trained) == 2 * 6 + 6
    model.rellax.set_trainable(lora=False)
    assert all(".lora_gates." in name for name, p in model.named_parameters() if p.requires_grad)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        losses.append(loss(model))
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(tiny.base_model(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    again = PeftModel.from_pretrained(tiny.base_model(), tmp_path, is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("saved", ["default", "weight", "w1", "lora_gates", "0"])
@pytest.mark.parametrize("loaded", ["default", "b1", "model"])
def test_any_adapter_name_will_do(tmp_path: Path, saved: str, loaded: str) -> None:
    model = made(saved)
    model.save_pretrained(tmp_path)
    names = load_file(file_of(tmp_path, saved))
    assert sum(name.startswith("base_model.model.rellax.gates.lora_gates.") for name in names) == 6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        again = PeftModel.from_pretrained(
            tiny.base_model(), file_of(tmp_path, saved).parent, adapter_name=loaded
        )
    assert torch.equal(loss(again), loss(model))
    assert again.peft_config[loaded].answer_ids == (tiny.NO, tiny.YES)


def test_low_memory_loading(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base_model(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loss(again), loss(model))


def test_several_adapters(tmp_path: Path) -> None:
    """Of different ranks and kinds: gates are switched, trained, saved, loaded and deleted with A and B."""
    alone = {"first": made("first", seed=1), "second": made("second", seed=2, r=2, interaction="diagonal")}
    expected = {name: loss(model).detach() for name, model in alone.items()}
    assert expected["first"] != expected["second"]
    for model in alone.values():
        model.save_pretrained(tmp_path)
    both = PeftModel.from_pretrained(tiny.base_model(), tmp_path / "first", adapter_name="one")
    both.load_adapter(tmp_path / "second", adapter_name="two", is_trainable=True)
    close(loss(both), expected["first"])
    both.set_adapter("two")
    close(loss(both), expected["second"])
    trained = [name for name, p in both.named_parameters() if p.requires_grad]
    assert len(trained) == 18
    assert all(".two." in name for name in trained)
    both.set_adapter("one")
    close(loss(both), expected["first"])

    both.save_pretrained(tmp_path / "again")
    for old, new in (("first", "one"), ("second", "two")):
        one, other = load_file(file_of(tmp_path, old)), load_file(file_of(tmp_path / "again", new))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    both.delete_adapter("one")
    assert set(both.rellax.gates.lora_gates) == {"two"}
    close(loss(both), expected["second"])


def test_names_that_peft_confuses_are_refused_when_saving(tmp_path: Path) -> None:
    model = made("0")
    model.add_adapter("1", config())
    with pytest.raises(InputError, match=r"got '0' beside \['1'\]: PEFT takes model.layers.1"):
        model.save_pretrained(tmp_path)


def _drop(word: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if word in name]:
            del tensors[name]

    return change


GATES = "base_model.model.rellax.gates.lora_gates"


@pytest.mark.parametrize("ignored", [False, True], ids=["strict", "ignore_mismatched_sizes"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("lora_gates"), r"expected rellax.gates.lora_gates.x.b1, it lacks that tensor \(6 in all\)"),
        (_drop("lora_gates.w2"), r"lora_gates.x.w2, it lacks that tensor \(1 in all\)"),
        (_drop("layers.1.mlp.down_proj.lora_B"), r"down_proj.lora_B.x.weight, it lacks"),
        (
            lambda t: t.update({f"{GATES}.w2": torch.ones(6, 9, 4)}),
            r"w2 of shape \(6, 9, 18\), got \(6, 9, 4\) \(1 in all\)",
        ),
        (
            lambda t: t.update({f"{GATES}.w3": torch.ones(1)}),
            r"expected no rellax.gates.lora_gates.w3, the model lacks it \(1 in all\)",
        ),
        (
            lambda t: t.update({f"{GATES}.default.w2": t.pop(f"{GATES}.w2")}),
            "lora_gates.x.w2, it lacks that tensor",
        ),
    ],
    ids=["gates", "one", "lora", "shape", "unknown", "named"],
)
def test_gates_are_never_silently_random(tmp_path: Path, change: Any, message: str, ignored: bool) -> None:
    made().save_pretrained(tmp_path)
    tensors = load_file(file_of(tmp_path))
    change(tensors)
    save_file(tensors, file_of(tmp_path))
    with pytest.raises(InputError, match=message):
        PeftModel.from_pretrained(
            tiny.base_model(), tmp_path, adapter_name="x", ignore_mismatched_sizes=ignored
        )
    model = made()
    with pytest.raises(InputError, match=message):
        model.load_adapter(tmp_path, "x", ignore_mismatched_sizes=ignored)


def test_plain_lora_is_not_loaded_as_gated(tmp_path: Path) -> None:
    plain = LoraConfig(r=3, lora_alpha=5, target_modules=list(tiny.TARGETS), task_type="CAUSAL_LM")
    get_peft_model(tiny.base_model(), plain).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lora_gates.default.b1, it lacks that tensor \(6 in all\)"):
        PeftModel.from_pretrained(tiny.base_model(), tmp_path, config=config())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        made().load_adapter(tmp_path, "x")


def test_without_this_package_peft_refuses_it(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CFLORA"
    script = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "KeyError: 'CFLORA'" in done.stderr


def test_without_instance_embed_or_adapter() -> None:
    model, arguments = made(), batch()
    plain = tiny.base_model()
    with model.disable_adapter():
        close(
            model(**arguments | {"labels": None}).logits,
            plain(arguments["input_ids"], arguments["attention_mask"]).logits,
        )
    del arguments["instance_embed"]
    ungated = model(**arguments).loss
    assert ungated != loss(model)
    with torch.no_grad():
        bank = model.rellax.active_bank()
        bank.w2.zero_()
        bank.b2.copy_(torch.eye(3).flatten())
    close(loss(model), ungated)


def test_generation() -> None:
    model = made().eval()
    arguments = {name: batch("left")[name] for name in ("input_ids", "attention_mask", "instance_embed")}
    options = {"max_new_tokens": 4, "do_sample": False}
    cached = model.generate(**arguments, **options)
    assert torch.equal(cached, model.generate(**arguments, **options, use_cache=False))
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**arguments, **options), cached)


def test_unloading_gives_the_base_back() -> None:
    base = tiny.base_model().requires_grad_(False)
    before = snapshot(base)
    model = get_peft_model(base, config())
    assert model.unload() is base
    after = snapshot(base)
    assert after == before


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
        lambda model: model.add_weighted_adapter(["default"], [1.0], "sum"),
    ],
    ids=["merge", "unload", "weighted"],
)
def test_gates_cannot_be_merged(merge: Callable[[Any], Any]) -> None:
    model = made()
    expected = loss(model)
    with pytest.raises(InputError, match=r"expected (an adapter|adapters) without gates"):
        merge(model)
    assert torch.equal(loss(model), expected)


def test_without_gates_it_is_lora() -> None:
    model = made(interaction="none")
    arguments = batch()
    with pytest.raises(InputError, match="instance_embed: expected None"):
        model(**arguments)
    del arguments["instance_embed"], arguments["labels"]
    expected = model(**arguments).logits
    close(model.merge_and_unload()(**arguments).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: expected nothing beside CFLoRA's gates, got True"),
        ({"lora_bias": True}, "lora_bias: expected nothing"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: expected nothing"),
        ({"cond_dim": 0}, "cond_dim: expected a whole number, at least 1 .*, got 0"),
        ({"interaction": "all"}, "interaction: expected one of"),
        ({"gate_init": "zero"}, "gate_init: expected one of"),
        ({"answer_ids": (3, 3)}, "answer_ids: expected two different token ids"),
    ],
)
def test_bad_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**options)


def test_numbers_of_numpy_can_be_saved() -> None:
    two = np.int64(2)
    given = config(r=two, cond_dim=two, answer_ids=[np.int64(tiny.NO), np.int64(tiny.YES)])
    assert [type(n) for n in (given.r, given.cond_dim, *given.answer_ids)] == [int] * 4


def test_adapters_that_do_not_go_together() -> None:
    model = made()
    with pytest.raises(InputError, match=r"target_modules: expected .* as in adapter 'default', got"):
        model.add_adapter("x", config(target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"answer_ids: expected .4, 7. as in adapter 'default', got None"):
        model.add_adapter("x", config(answer_ids=None))
    assert set(model.peft_config) == set(model.rellax.gates.lora_gates) == {"default"}
    close(loss(model), loss(made()))
    with pytest.raises(InputError, match="expected one of patch_model, got one of CFLoraConfig"):
        save_adapter(model, "anywhere")
    with pytest.raises(InputError, match="expected one of LlamaForCausalLM"):
        get_peft_model(torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)}), config(task_type=None))
