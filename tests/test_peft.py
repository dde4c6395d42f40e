"""Models that carry PEFT LoRA: their A and B are taken over, and PEFT's own results are the measure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from test_patch import close, snapshot
from tiny_models import Truth

from rellax.errors import InputError
from rellax.patch import answer_logits, load_adapter, patch_model, save_adapter, unpatch_model


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
    weight = torch.randn_like(logits)
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
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [tiny.PLACEHOLDERS[0]]}
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
    twin = copy.deepcopy(model)
    close(twin(ids).logits, model(ids).logits)
    model.merge_adapter()
    with pytest.raises(InputError, match="expected PEFT's adapter unmerged"):
        model(ids)


def _two_adapters(model: Any) -> Any:
    model.add_adapter("second", lora_config())
    model.base_model.set_adapter(["default", "second"])
    return model


def _merged(model: Any) -> Any:
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"use_dora": True}, None, "expected plain LoRA .* got the variant DoraLinearVariant"),
        ({"lora_bias": True}, None, "got lora_bias"),
        ({}, _two_adapters, r"active adapters \['default', 'second'\] where one is expected"),
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


def test_adapters_move_between_peft_and_plain_models(tmp_path: Any) -> None:
    model = patch_model(peft_model(), tiny.config())
    tiny.randomise(model.get_base_model(), seed=6)
    save_adapter(model, tmp_path / "adapter")
    plain, other = load_adapter(tiny.base_model(), tmp_path / "adapter"), peft_model()
    load_adapter(other, tmp_path / "adapter")
    arguments = tiny.batch(tiny.instances(placeholders=False))
    for loaded in (plain, other):
        close(loaded(**arguments).loss, model(**arguments).loss)
