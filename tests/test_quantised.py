"""Models with quantised base weights: what they compute is their dequantised weights' result plus CFLoRA."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny_models as tiny
import torch
from test_patch import CHECKPOINTS, close, set_checkpointing
from tiny_models import LAYOUTS, Truth
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from workspace import Workspace, make_model

from rellax.ctr import cli, task
from rellax.ctr.config import read_config
from rellax.ctr.dataset import Dataset
from rellax.ctr.llm import load_model
from rellax.errors import InputError
from rellax.patch import answer_logits, load_adapter, patch_model, quantised, save_adapter, unpatch_model
from rellax.patch.forward import Handed

PACKAGES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "fp4": "bitsandbytes"} | dict.fromkeys(
    ("int8wo", "int8dq", "int4wo", "float8wo"), "torchao"
)
DYNAMIC = ("int8", "int8dq")  # these round activations too
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not here"),
    )
    for kind, package in PACKAGES.items()
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose layers divide into blocks of 64 weights."""
    path = tmp_path_factory.mktemp("quantised") / "model"
    save(path, hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.15)
    return path


def save(path: Path, **sizes: Any) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**tiny._COMMON | sizes)).save_pretrained(path)


def load(folder: Path, kind: str) -> Any:
    return load_model(folder, dtype="float32", quantize=kind).train()


def dequantised(model: Any, folder: Path) -> Any:
    """The same model with ordinary weights."""
    plain = load_model(folder, dtype="float32")
    with torch.no_grad():
        for name, module in model.named_modules():
            if quantised.describe(module):
                plain.get_submodule(name).weight.copy_(weight(module))
    return plain


def weight(module: Any) -> Tensor:
    kind = quantised.describe(module)
    assert kind is not None
    if kind.startswith("torchao"):
        return module.weight.dequantize()
    from bitsandbytes import functional as bnb

    if kind == "bitsandbytes int8":
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return bnb.int8_vectorwise_dequant(module.weight.data, scales)
    return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)


@every_kind
def test_loading_quantises_the_decoder_alone(folder: Path, kind: str) -> None:
    model, original = load(folder, kind), load_model(folder, dtype="float32")
    found = {name for name, module in model.named_modules() if quantised.describe(module)}
    assert len(found) == 2 * 7
    for name in found:
        was = original.get_submodule(name).weight
        error = (weight(model.get_submodule(name)) - was).norm() / was.norm()
        assert 0 < error < (0.02 if "8" in kind and kind != "float8wo" else 0.2)
    assert model.lm_head.weight.dtype == torch.float32


@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_dequantised_weights(
    folder: Path, kind: str, layout: str
) -> None:
    model = load(folder, kind)
    plain = dequantised(model, folder)
    tiny.patched(model)
    truth, made = Truth(plain, model), tiny.instances()
    out = model(**tiny.batch(made, layout))
    loss = truth.choice_loss(made)
    found, true = tiny.gradients(model, out.loss), tiny.true_gradients(model, loss)
    if kind not in DYNAMIC:
        close(out.loss, loss)
        close(out.answer_logits, truth.choice_logits(made).detach())
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-4)
    else:
        assert out.loss.item() == pytest.approx(loss.item(), rel=0.1)
        one, other = (torch.cat([g.flatten() for g in grads.values()]) for grads in (found, true))
        assert torch.cosine_similarity(one, other, dim=0) > 0.98
    arguments = tiny.batch(made, layout, answers=False)
    assert torch.equal(answer_logits(model, **arguments), answer_logits(model, **arguments))


@every_kind
def test_a_layer_is_its_own_forward_plus_the_update(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    layer = model.model.layers[0].self_attn.v_proj
    w = weight(layer)
    x, gate = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 3, 3, requires_grad=True)
    with torch.no_grad():
        base = layer(x)
    tiny.patched(model)
    layer.receive(Handed(gate))
    y = layer(x)
    x2, gate2 = (t.detach().clone().requires_grad_() for t in (x, gate))
    update = layer.scale * ((x2 @ layer.lora_a.t()) @ gate2) @ layer.lora_b.t()
    close(y, base + update)
    dy = torch.randn_like(y)
    y.backward(dy)
    grads = layer.lora_a.grad.clone(), layer.lora_b.grad.clone()
    layer.lora_a.grad = layer.lora_b.grad = None
    update.backward(dy)
    torch.testing.assert_close(x.grad, x2.grad + dy @ w, rtol=1e-3, atol=1e-3)
    close(gate.grad, gate2.grad)
    close(grads, (layer.lora_a.grad, layer.lora_b.grad))


@every_kind
@pytest.mark.parametrize("checkpointing", CHECKPOINTS[1:])
def test_checkpointing_changes_no_gradient(folder: Path, kind: str, checkpointing: str) -> None:
    model = tiny.patched(load(folder, kind), dropout=0.25)
    arguments = tiny.batch(tiny.instances())
    torch.manual_seed(5)
    expected = tiny.gradients(model, model(**arguments).loss)
    set_checkpointing(model, checkpointing)
    torch.manual_seed(5)
    close(tiny.gradients(model, model(**arguments).loss), expected)


@every_kind
def test_adapters_are_saved_and_loaded(folder: Path, kind: str, tmp_path: Path) -> None:
    model = tiny.patched(load(folder, kind))
    save_adapter(model, tmp_path / "adapter")
    arguments = tiny.batch(tiny.instances())
    loaded = load_adapter(load(folder, kind), tmp_path / "adapter")
    assert torch.equal(loaded(**arguments).loss, model(**arguments).loss)
    plain = load_adapter(dequantised(load(folder, kind), folder), tmp_path / "adapter")
    assert plain(**arguments).loss.item() == pytest.approx(model(**arguments).loss.item(), rel=0.1)


@every_kind
def test_unpatching_gives_the_original_back(folder: Path, kind: str) -> None:
    model, ids = load(folder, kind), tiny.batch(tiny.instances(placeholders=False))["input_ids"]

    def snapshot() -> dict[str, Any]:
        described = {name: (type(m), quantised.describe(m)) for name, m in model.named_modules()}
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        return {"modules": described, "flags": flags, "state": list(model.state_dict())}

    before, logits = snapshot(), model(ids).logits.detach()
    tiny.patched(model)
    model(**tiny.batch(tiny.instances())).loss.backward()
    unpatch_model(model)
    assert snapshot() == before
    assert torch.equal(model(ids).logits, logits)


@every_kind
def test_the_report_says_what_it_is(folder: Path, kind: str) -> None:
    original = load_model(folder, dtype="float32")
    model = patch_model(load(folder, kind), tiny.config())
    report = model.rellax.report
    assert set(report.quantised) == set(report.patched)
    assert not report.shared_inputs
    assert report.base_parameters == sum(p.numel() for p in original.parameters())
    name = report.quantised["model.layers.0.self_attn.q_proj"]
    assert name.startswith(PACKAGES[kind])
    assert f"patched 2 x model.layers.*.self_attn.q_proj: {name}" in str(report)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0] in ("int8", "nf4", "int8wo")])
def test_pefts_lora_on_quantised_layers_is_taken_over(folder: Path, kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    def make() -> Any:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=list(tiny.TARGETS), task_type="CAUSAL_LM")
        model = get_peft_model(load(folder, kind), config)
        tiny.randomise(model)
        return model

    theirs, ours = make(), patch_model(make())
    ids = tiny.batch(tiny.instances(placeholders=False))["input_ids"]
    close(ours(ids).logits, theirs(ids).logits)
    assert len(ours.rellax.report.quantised) == 6
    with ours.disable_adapter(), theirs.disable_adapter():
        close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0] in ("nf4", "int8wo", "int8dq")])
def test_pefts_lora_on_quantised_layers_is_trained(folder: Path, kind: str) -> None:
    """As A and B of our own are; PEFT alone has no gradient through dynamic weights."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=3, lora_alpha=5, target_modules=list(tiny.TARGETS), task_type="CAUSAL_LM")
    models = get_peft_model(load(folder, kind), lora), load(folder, kind)
    arguments = tiny.batch(tiny.instances(placeholders=False))
    del arguments["instance_embed"]
    theirs, ours = (tiny.patched(model, soft_prompt=False, interaction="none") for model in models)
    found, expected = (tiny.gradients(model, model(**arguments).loss) for model in (theirs, ours))
    close(list(found.values()), list(expected.values()))


def test_a_quantised_output_layer_is_refused(folder: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not here")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load_model(folder, dtype="float32")
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name == "lm_head")
    with pytest.raises(InputError, match="output layer that is not quantised, got one of torchao Int8Tensor"):
        patch_model(model, tiny.config())


def test_some_layers_quantised_and_others_not(folder: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not here")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load_model(folder, dtype="float32").train()
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith("q_proj"))
    plain = dequantised(model, folder)
    options = {"target_modules": ("q_proj", "k_proj", "v_proj")}
    tiny.patched(model, **options)
    assert len(model.rellax.report.quantised) == 2
    assert len(model.rellax.report.shared_inputs) == 2  # k and v
    truth, made = Truth(plain, model), tiny.instances()
    close(model(**tiny.batch(made)).loss, truth.choice_loss(made))


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("int8wo", "torchao")])
def test_a_missing_package_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = f"quantize: '{kind}' needs {package}, which is not installed; pip install 'rellax\\[quant\\]'"
    with pytest.raises(InputError, match=message):
        load_model(folder, quantize=kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param(
            "nf4",
            "takes layers that read a multiple of 64 values, got 40 in model.layers.0.mlp",
            marks=KINDS[1].marks,
        ),
        pytest.param(
            "int4wo",
            "cannot be quantised to 'int4wo'; for one, layers must read a multiple of 32",
            marks=KINDS[3].marks,
        ),
    ],
)
def test_sizes_that_do_not_divide(tmp_path: Path, kind: str, message: str) -> None:
    save(tmp_path / "odd", hidden_size=64, intermediate_size=40, head_dim=16)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "odd", kind)


def test_patching_refuses_sizes_that_do_not_divide(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not here")
    save(tmp_path / "odd", hidden_size=64, intermediate_size=40, head_dim=16)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "odd", quantization_config=options)
    before = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=r"model: bitsandbytes nf4 on a CPU takes .* 64 values, got 40 in"):
        patch_model(model, tiny.config())
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0] in ("nf4", "int8wo")])
def test_pickling_one_says_what_to_do_instead(folder: Path, kind: str) -> None:
    with pytest.raises(InputError, match="got PatchedQuantisedLinear; save_adapter saves what was trained"):
        pickle.dumps(patch_model(load(folder, kind), tiny.config()))


def test_a_copy_works_on_its_own(folder: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not here")
    model = tiny.patched(load(folder, "int8wo"))
    arguments = tiny.batch(tiny.instances())
    twin = copy.deepcopy(model)
    tiny.randomise(model, seed=9)
    assert not torch.equal(twin(**arguments).loss, model(**arguments).loss)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0] in ("nf4", "int8", "int8wo")])
def test_training_evaluation_and_prediction(workspace: Workspace, tmp_path: Path, kind: str) -> None:
    dataset = Dataset.load(workspace.data)
    make_model(tmp_path / "model", dataset, hidden_size=128)
    shutil.copytree(workspace.data, tmp_path / "data")
    shutil.copytree(workspace.crm, tmp_path / "crm")
    common = ["--work", str(tmp_path), "--device", "cpu"]
    options = ["--model", str(tmp_path / "model"), "--dtype", "float32", "--k", "2", "--shots", "8"]
    options += ["--prompts", "recent", "--validation-samples", "12", "--batch-size", "4", "--lr", "0.01"]
    first = ["train", "first", "--quantize", kind, *options, *common]
    second = ["train", "second", "--quantize", kind, "--stage", "2", "--from", "first", *options, *common]
    assert cli.main(first) == 0
    assert cli.main([*second, "--interaction", "full"]) == 0
    run = tmp_path / "second"
    assert json.loads((run / "config.json").read_text())["quantize"] == kind
    assert read_config(run).quantize == kind
    assert cli.main(["evaluate", "second", "--split", "valid", "--samples", "12", *common]) == 0
    chosen, again = (pq.read_table(folder / "predictions.parquet") for folder in (run, run / "valid"))
    assert chosen["sample"].equals(again["sample"])
    assert again["probability"].to_numpy() == pytest.approx(chosen["probability"].to_numpy(), abs=1e-6)

    ids = [dataset.users["user_id"][0].as_py(), dataset.items["item_id"][3].as_py()]
    (tmp_path / "new.csv").write_text("user_id,item_id\n" + ",".join(ids) + "\n")
    loaded: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "load_model", lambda *a, **k: loaded.append(k["quantize"]) or load_model(*a, **k))
        out = ["--out", str(tmp_path / "out.csv")]
        assert cli.main(["predict", "second", str(tmp_path / "new.csv"), *out, *common]) == 0
    assert loaded == [kind]
    assert (tmp_path / "out.csv").read_text().count("\n") == 2
