"""Models that carry PEFT LoRA: their A and B are taken over, and PEFT's own results are the measure."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from test_patch import close, snapshot
from tiny_models import Truth
from workspace import GATED, Workspace

from rellax.ctr import cli
from rellax.ctr.config import read_config
from rellax.ctr.train import train
from rellax.errors import InputError
from rellax.patch import answer_logits, export_peft, load_adapter, patch_model, save_adapter, unpatch_model


def lora_config(**options: Any) -> LoraConfig:
    defaults: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "target_modules": list(tiny.TARGETS),
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**defaults | options)


def peft_model(family: str = "llama", **options: Any) -> Any:
    """A PEFT model with random A and B."""
    model = get_peft_model(tiny.base_model(family), lora_config(**options), autocast_adapter_dtype=False)
    tiny.randomise(model)
    return model


def plain_ids() -> torch.Tensor:
    return tiny.batch(tiny.instances(placeholders=False))["input_ids"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_gates_at_the_identity_it_is_peft_lora(family: str) -> None:
    theirs = peft_model(family)
    ours = tiny.patched(tiny.base_model(family), soft_prompt=False, gate_init="identity")
    ours.rellax.gate_bank.reset_parameters()
    lora = theirs.get_base_model()
    with torch.no_grad():
        for name, projection in ours.rellax.projections.items():
            layer = lora.get_submodule(name)
            projection.lora_a.copy_(layer.lora_A["default"].weight)
            projection.lora_b.copy_(layer.lora_B["default"].weight)
    ids = plain_ids()
    logits, expected = ours(ids, instance_embed=torch.randn(3, tiny.COND)).logits, theirs(ids).logits
    close(logits, expected)
    weight = 0.1 * torch.randn_like(logits)  # gradients of the size of 1, which `close` is made for
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, projection in ours.rellax.projections.items():
        layer = lora.get_submodule(name)
        close(projection.lora_a.grad, layer.lora_A["default"].weight.grad)
        close(projection.lora_b.grad, layer.lora_B["default"].weight.grad)


def _wrapped() -> tuple[Any, Any]:
    model = peft_model()
    return model, model.get_base_model()


def _injected() -> tuple[Any, Any]:
    model = tiny.base_model()
    inject_adapter_in_model(lora_config(), model)
    tiny.randomise(model)
    return model, model


@pytest.mark.parametrize("make", [_wrapped, _injected], ids=["PeftModel", "injected"])
def test_a_and_b_are_taken_over(make: Any) -> None:
    model, inner = make()
    parameters = dict(model.named_parameters())
    before, logits = snapshot(inner), model(plain_ids()).logits
    options = {"r": 3, "alpha": 5, "dropout": 0.0, "target_modules": tiny.TARGETS}
    assert patch_model(model, tiny.config(**options), soft_prompt=tiny.soft_prompt_config()) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.rellax is inner.rellax
    assert torch.equal(model.rellax.projections["model.layers.1.mlp.down_proj"].lora_b, after_b(inner))
    close(model(plain_ids()).logits, logits)

    tiny.randomise(inner, seed=5)
    truth, made = Truth(tiny.base_model(), inner), tiny.instances()
    loss = model(**tiny.batch(made)).loss
    close(loss, truth.choice_loss(made))
    close(tiny.gradients(inner, loss), tiny.true_gradients(inner, truth.choice_loss(made)))
    prompts = tiny.batch(made, "left", answers=False)
    close(answer_logits(model, **prompts), truth.choice_logits(made).detach())
    options = {"max_new_tokens": 4, "do_sample": False}
    model.eval()
    cached = model.generate(**prompts, **options)
    assert torch.equal(cached, model.generate(**prompts, **options, use_cache=False))

    model.train()
    unpatch_model(model)
    assert snapshot(inner) == before
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())


def after_b(inner: Any) -> torch.Tensor:
    return inner.get_parameter("model.layers.1.mlp.down_proj.lora_B.default.weight")


def test_without_a_configuration_pefts_is_taken() -> None:
    model = patch_model(peft_model(r=4, lora_alpha=8, lora_dropout=0.25, use_rslora=True))
    config = model.rellax.config
    assert (config.r, config.dropout, set(config.target_modules)) == (4, 0.25, set(tiny.TARGETS))
    assert config.alpha == 16  # rsLoRA: 8 / sqrt(4) = 16 / 4
    ids = plain_ids()
    expected = peft_model(r=4, lora_alpha=8, lora_dropout=0.25, use_rslora=True).eval()(ids).logits
    close(model.eval()(ids).logits, expected)


def test_pefts_switches_still_work() -> None:
    model = patch_model(peft_model())
    ids, embed = plain_ids(), torch.randn(3, 64)
    base = tiny.base_model()
    with model.disable_adapter():
        close(model(ids, instance_embed=embed).logits, base(ids).logits)
    assert all(layer.in_flight.handed is None for layer in model.rellax.projections.values())
    twin = copy.deepcopy(model)
    close(twin(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "merge",
    [lambda m: m.merge_adapter(), lambda m: m.merge_and_unload(), lambda m: m.unload()],
    ids=["merge_adapter", "merge_and_unload", "unload"],
)
def test_gates_are_not_lost_in_a_merge(merge: Callable[[Any], Any]) -> None:
    """PEFT would leave a model that takes `instance_embed` and does nothing with it."""
    model, arguments = (
        patch_model(peft_model(), tiny.config()),
        tiny.batch(tiny.instances(placeholders=False)),
    )
    expected = model(**arguments).loss
    with pytest.raises(InputError, match=r"without gates to merge .*call rellax.unpatch_model first"):
        merge(model)
    assert torch.equal(model(**arguments).loss, expected)
    merge(unpatch_model(model))


def test_without_gates_an_adapter_can_be_merged() -> None:
    model, ids = patch_model(peft_model(), tiny.config(interaction="none")), plain_ids()
    expected = model(ids).logits
    model.merge_adapter()
    with pytest.raises(InputError, match="expected PEFT's adapter unmerged"):
        model(ids)
    model.unmerge_adapter()
    close(model.merge_and_unload()(ids).logits, expected)


def test_without_gates_an_adapter_can_be_unloaded() -> None:
    model, ids = patch_model(peft_model(), tiny.config(interaction="none")), plain_ids()
    close(model.unload()(ids).logits, tiny.base_model()(ids).logits)


INPUTS = ["q_proj", "k_proj", "v_proj"]


def _two_to_switch(**options: Any) -> Any:
    model = peft_model(target_modules=INPUTS)
    model.add_adapter("other", lora_config(**{"target_modules": INPUTS} | options))
    model.set_adapter("other")
    tiny.randomise(model, seed=5)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {"v_proj": 60}},
        {"rank_pattern": {"k_proj": 2}},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["k_proj", "v_proj"]},
    ],
    ids=["scale", "rank", "first", "others"],
)
def test_another_adapter_of_peft_is_switched_to(options: dict[str, Any]) -> None:
    """Its layers that read one tensor differ from each other, or some are not adapted."""
    model, ids = _two_to_switch(**options), plain_ids()
    expected = model(ids).logits
    model.set_adapter("default")
    first = model(ids).logits
    patch_model(model)
    close(model(ids).logits, first)
    model.set_adapter("other")
    close(model(ids).logits, expected)


def test_another_adapter_of_peft_has_its_own_dropout() -> None:
    model, ids = _two_to_switch(lora_dropout=0.5), plain_ids()
    model.set_adapter("default")
    patch_model(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.set_adapter("other")
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_the_active_adapter_of_peft_is_taken_over() -> None:
    model, ids = _two_to_switch(r=2, lora_alpha=60), plain_ids()
    expected = model(ids).logits
    config = patch_model(model).rellax.config
    assert (config.r, config.alpha) == (2, 60)
    close(model(ids).logits, expected)


def test_another_adapter_of_peft_can_be_merged() -> None:
    model, ids = _two_to_switch(), plain_ids()
    expected = model(ids).logits
    model.set_adapter("default")
    patch_model(model, tiny.config(interaction="none", target_modules=INPUTS))
    close(model.merge_and_unload(adapter_names=["other"])(ids).logits, expected)


def test_compiled_it_is_one_graph_for_each_adapter() -> None:
    model, arguments = _two_to_switch(alpha_pattern={"v_proj": 60}), {"input_ids": plain_ids()}
    model.set_adapter("default")
    patch_model(model).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name in ("default", "other"):
        model.set_adapter(name)
        close(compiled(**arguments).logits, model(**arguments).logits)


def test_another_adapter_that_is_no_plain_lora() -> None:
    model = _two_to_switch(use_dora=True)
    model.set_adapter("default")
    patch_model(model).set_adapter("other")
    with pytest.raises(InputError, match=r"expected plain LoRA of PEFT .* got the variant DoraLinearVariant"):
        model(plain_ids())


def _two_adapters(model: Any) -> Any:
    model.add_adapter("second", lora_config())
    model.base_model.set_adapter(["default", "second"])
    return model


def _merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def _partly_adapted(model: Any) -> Any:
    model.add_adapter("other", lora_config(target_modules=["q_proj"]))
    model.set_adapter("other")
    return model


def _strange_base(model: Any) -> Any:
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.base_layer.__class__ = type("Strange", (torch.nn.Linear,), {})
    return model


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"use_dora": True}, None, "expected plain LoRA .* got the variant DoraLinearVariant"),
        ({"lora_bias": True}, None, "got lora_bias"),
        ({}, _two_adapters, r"active adapters \['default', 'second'\] where one is expected"),
        ({}, _partly_adapted, r"v_proj: .* active adapters \['other'\] where one is expected"),
        ({}, _strange_base, r"layers.1.self_attn.q_proj: expected plain LoRA .* got .*Linear on Strange"),
        ({}, _merged, "got an adapter merged into the base weights"),
        ({"rank_pattern": {"v_proj": 2}}, None, r"one \(r, alpha, dropout\) in all"),
        ({"target_modules": ["q_proj", "lm_head"]}, None, r"got \['lm_head'\]"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, None, r"got \['model.embed_tokens'\]"),
        ({"r": 2}, None, "config.r: expected 2 as in the model's PEFT LoRA, got 3"),
        ({"lora_alpha": 3}, None, "config.alpha: expected 3"),
        ({"target_modules": ["q_proj"]}, None, "config.target_modules: expected"),
    ],
)
def test_what_cannot_be_taken_over(options: dict[str, Any], change: Any, message: str) -> None:
    model = peft_model(**options)
    model = change(model) if change else model
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        patch_model(model, tiny.config())
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (AdaLoraConfig(target_modules=["q_proj"], init_r=3, total_step=10), r"adalora\.layer\.SVDLinear"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"ia3\.layer\.Linear"),
        (LoHaConfig(target_modules=["q_proj"], r=3), r"loha\.layer\.Linear"),
    ],
    ids=["adalora", "ia3", "loha"],
)
def test_another_method_of_peft_is_refused(config: PeftConfig, layer: str) -> None:
    model = get_peft_model(tiny.base_model(), config)
    with pytest.raises(
        InputError, match=rf"q_proj: expected plain LoRA .* got peft\.tuners\.{layer} on Linear"
    ):
        patch_model(model)


def test_adapters_move_between_peft_and_plain_models(tmp_path: Any) -> None:
    model = patch_model(peft_model(), tiny.config())
    tiny.randomise(model.get_base_model(), seed=6)
    save_adapter(model, tmp_path / "adapter")
    plain, other = load_adapter(tiny.base_model(), tmp_path / "adapter"), peft_model()
    load_adapter(other, tmp_path / "adapter")
    arguments = tiny.batch(tiny.instances(placeholders=False))
    for loaded in (plain, other):
        close(loaded(**arguments).loss, model(**arguments).loss)


@pytest.mark.parametrize("adapter", ["default", "another.name"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 2, "rank_pattern": {"q_proj": 4, "v_proj": 4, "down_proj": 4}, "lora_alpha": 6},
        {"lora_alpha": 1, "alpha_pattern": {"q_proj": 6, "v_proj": 6, "down_proj": 6}},
        {"target_modules": r".*self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear"},
    ],
    ids=["plain", "rslora", "rank", "alpha", "regex", "all-linear"],
)
def test_a_checkpoint_of_peft_is_loaded(tmp_path: Path, options: dict[str, Any], adapter: str) -> None:
    theirs = get_peft_model(tiny.base_model(), lora_config(**options), adapter_name=adapter.replace(".", "_"))
    tiny.randomise(theirs)
    theirs.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / "another_name"
    ours, ids = load_adapter(tiny.base_model(), folder), plain_ids()
    assert ours.rellax.config.interaction == "none"
    close(ours(ids).logits, theirs(ids).logits)

    config = ours.rellax.config
    values = {"r": config.r, "alpha": config.alpha, "target_modules": config.target_modules}
    gated = patch_model(tiny.base_model(), tiny.config(**values, gate_init="identity"))
    with pytest.raises(InputError, match=r"expected rellax.gate_bank.b1, it lacks"):
        load_adapter(gated, folder)
    load_adapter(gated, folder, partial=True)
    embed = torch.randn(3, tiny.COND)
    close(gated(ids, instance_embed=embed).logits, theirs(ids).logits)


def _change(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _retensor(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _pickle(folder: Path) -> None:
    """A file that would run code if it were unpickled."""
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Path("anything")}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(peft_type="LOHA"), "peft_type LORA, got 'LOHA'"),
        (_change(bias="all"), "bias='none', got 'all'"),
        (_change(init_lora_weights="pissa"), "got init_lora_weights='pissa', which changes them"),
        (_change(use_dora=True), "expected plain LoRA, got use_dora=True"),
        (_change(modules_to_save=["lm_head"]), r"got modules_to_save=\['lm_head'\]"),
        (_change(something_new=3), "got something_new=3"),
        (
            _change(alpha_pattern={"q_proj": 7}),
            r"one \(r, alpha\) in all layers, got \[\(3, 5.0\), \(3, 7.0\)\]",
        ),
        (_retensor(lambda t: t.update(x=torch.ones(2))), "expected nothing but lora_A and lora_B .*, got x"),
        (_retensor(lambda t: t.pop(f"{FIRST}.lora_B.weight")), "lora_B .d_out, r. of model.layers.0"),
        (
            _retensor(
                lambda t: [
                    t.update({name.replace("layers.1", "layers.2"): t[name].clone()}) for name in list(t)
                ]
            ),
            "expected linear layers of LlamaForCausalLM's decoder, got model.layers.2.mlp.down_proj",
        ),
        (_retensor(lambda t: t.clear()), "got no layers"),
        (
            _retensor(lambda t: t[f"{FIRST}.lora_A.weight"].fill_(math.nan)),
            "expected finite floating numbers",
        ),
        (
            _retensor(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(3, 32, dtype=torch.int64)})),
            r"expected finite floating numbers as .*q_proj.lora_A.weight, got others \(torch.int64\)",
        ),
        (_change(lora_alpha="six"), "expected a number as lora_alpha, got 'six'"),
        (_change(lora_alpha=10**400), "expected a number as lora_alpha, got 1000"),
        (_change(lora_dropout=None), "expected a number as lora_dropout, got None"),
        (_change(alpha_pattern={"q_proj": "six"}), "expected a number as q_proj, got 'six'"),
        (_change(alpha_pattern=["q_proj"]), r"numbers by pattern as alpha_pattern, got \['q_proj'\]"),
        (_change(alpha_pattern={"(": 3}), "expected regular expressions in alpha_pattern, got others"),
        (_cut, "adapter_model.safetensors: expected a file of nothing but tensors"),
        (_pickle, "adapter_model.bin: expected a file of nothing but tensors"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "expected a file of tensors, found none",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "peft_type LORA, got 'list'"),
    ],
)
def test_checkpoints_of_peft_that_are_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    peft_model().save_pretrained(tmp_path)
    change(tmp_path)
    model = tiny.base_model()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"target_modules": r".*(0\.self_attn\.q|1\.self_attn\.v)_proj"},
        {"exclude_modules": ["model.layers.0.mlp.down_proj"]},
    ],
    ids=["layers", "regex", "exclude"],
)
def test_adapters_of_some_layers(tmp_path: Path, options: dict[str, Any]) -> None:
    """PEFT's folder, our own of the same model, and ours as PEFT's, on models that have not been patched."""
    theirs, ids = peft_model(**options), plain_ids()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(ids).logits
    gated = patch_model(theirs, tiny.config(target_modules=patch_targets(theirs)))
    tiny.randomise(gated.rellax, seed=4)
    save_adapter(gated, tmp_path / "ours")
    with pytest.warns(UserWarning, match="gates"):
        export_peft(tmp_path / "ours", tmp_path / "exported")

    patched = set(gated.rellax.report.patched)
    assert len(patched) in (2, 3, 5)
    for folder in ("theirs", "ours", "exported"):
        loaded = load_adapter(tiny.base_model(), tmp_path / folder)
        assert set(loaded.rellax.report.patched) == patched
        assert loaded.rellax.report.skipped["model.layers.0.mlp.down_proj"] == "not in the adapter"
        close(loaded(ids).logits, expected)
        if folder == "ours":
            embed = torch.randn(3, tiny.COND)
            close(loaded(ids, instance_embed=embed).logits, gated(ids, instance_embed=embed).logits)
    again = PeftModel.from_pretrained(tiny.base_model(), tmp_path / "exported")
    layers = {name for name, module in again.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert layers == patched
    close(again(ids).logits, expected)


def patch_targets(model: Any) -> tuple[str, ...]:
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return tuple({name.rpartition(".")[2] for name in names})


def test_pickling_one_says_what_to_do_instead() -> None:
    with pytest.raises(InputError, match="got PatchedPeftLinear; save_adapter saves what was trained"):
        pickle.dumps(patch_model(peft_model()))


def test_old_checkpoints_of_peft(tmp_path: Path) -> None:
    """As they were before safetensors."""
    theirs = peft_model()
    theirs.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    close(load_adapter(tiny.base_model(), tmp_path)(plain_ids()).logits, theirs(plain_ids()).logits)


def _stage_1_by_peft(workspace: Workspace, folder: Path, **options: Any) -> None:
    from rellax.ctr.llm import load_model

    model = get_peft_model(load_model(workspace.model, dtype="float32"), lora_config(**options))
    tiny.randomise(model)
    model.save_pretrained(folder)


def test_stage_2_starts_from_a_checkpoint_of_peft(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _stage_1_by_peft(workspace, tmp_path / "lora", use_rslora=True, r=4, target_modules=["q_proj", "o_proj"])
    for name in ("data", "crm", "retrieved"):
        shutil.copytree(workspace.root / name, tmp_path / name)
    shutil.copytree(workspace.embeddings, tmp_path / "embeddings")
    command = ["train", "gated", "--stage", "2", "--from", str(tmp_path / "lora"), "--interaction", "full"]
    command += ["--model", str(workspace.model), "--work", str(tmp_path), "--prompts", "recent", "--k", "2"]
    command += ["--shots", "8", "--validation-samples", "12", "--batch-size", "4", "--dtype", "float32"]
    assert cli.main([*command, "--r", "5"]) == 2
    assert "r: expected 4, as in" in capsys.readouterr().err
    assert cli.main(command) == 0
    config = read_config(tmp_path / "gated")
    assert (config.r, config.alpha, set(config.target_modules)) == (4, 10, {"q_proj", "o_proj"})
    theirs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "gated" / "adapter" / "adapter.safetensors")
    assert torch.equal(ours["model.layers.0.self_attn.q_proj.lora_b"], theirs[f"{FIRST}.lora_B.weight"])
    assert ours["rellax.gate_bank.w2"].any()  # was zero: it has been trained
    assert cli.main(["evaluate", "gated", "--samples", "5", "--work", str(tmp_path)]) == 0

    _retensor(lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])(
        tmp_path / "lora"
    )
    capsys.readouterr()
    assert cli.main([*command[:1], "untrained", *command[2:]]) == 2
    assert "expected a trained adapter, but B is zero" in capsys.readouterr().err
    assert (
        cli.main(["evaluate", "gated", "--samples", "6", "--work", str(tmp_path)]) == 2
    )  # its start changed


@pytest.mark.parametrize("parts", [{}, {"interaction": "full"}, GATED], ids=["lora", "gates", "both"])
def test_our_adapters_are_plain_lora_for_peft(tmp_path: Path, parts: dict[str, Any]) -> None:
    parts = {"interaction": "none", "soft_prompt": False} | parts
    model = tiny.patched(tiny.base_model(), **parts)
    save_adapter(model, tmp_path / "ours")
    dropped = " and no ".join(
        ["gates"] * (parts["interaction"] != "none") + ["soft prompt"] * parts["soft_prompt"]
    )
    if dropped:
        with pytest.warns(UserWarning, match=f"has no {dropped}, which are dropped"):
            export_peft(tmp_path / "ours", tmp_path / "theirs", base_model="some/model")
    else:
        export_peft(tmp_path / "ours", tmp_path / "theirs", base_model="some/model")
    theirs = PeftModel.from_pretrained(tiny.base_model(), tmp_path / "theirs", adapter_name="x")
    assert theirs.peft_config["x"].base_model_name_or_path == "some/model"
    close(theirs(plain_ids()).logits, model(plain_ids()).logits)
    back = load_adapter(tiny.base_model(), tmp_path / "theirs")
    close(back(plain_ids()).logits, model(plain_ids()).logits)


def test_export_does_not_replace_other_folders(tmp_path: Path) -> None:
    save_adapter(tiny.patched(tiny.base_model(), soft_prompt=False, interaction="none"), tmp_path / "ours")
    for _ in range(2):  # it replaces its own
        export_peft(tmp_path / "ours", tmp_path / "thesis")
    (tmp_path / "thesis" / "tokenizer.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"thesis: expected a new folder, or one of .*, found tokenizer.json"
    ):
        export_peft(tmp_path / "ours", tmp_path / "thesis")
    assert (tmp_path / "thesis" / "tokenizer.json").read_text() == "{}"


def test_runs_are_exported_by_the_command_line(workspace: Workspace, tmp_path: Path) -> None:
    from rellax.ctr.llm import load_model

    train(workspace.config(), tmp_path / "run", progress=False)
    out = tmp_path / "peft"
    assert cli.main(["export-peft", "run", str(out), "--work", str(tmp_path)]) == 0
    theirs = PeftModel.from_pretrained(load_model(workspace.model, dtype="float32"), out)
    ours = load_adapter(load_model(workspace.model, dtype="float32"), tmp_path / "run" / "adapter").eval()
    ids = torch.arange(20)[None]
    close(theirs(ids).logits, ours(ids).logits)
