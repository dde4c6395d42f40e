"""Patch a Hugging Face model in place, by swapping the classes of its module instances, and back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rellax.errors import InputError
from rellax.nn import AnswerHead, GateBank, SoftPrompt
from rellax.nn.cflora import CFLoRAUpdate
from rellax.patch import attention, quantised, rules
from rellax.patch.config import CFLoRAConfig, SoftPromptConfig
from rellax.patch.forward import AnswerOutput, Attention, CausalLM, Projection
from rellax.patch.identity import identity
from rellax.patch.state import RellaxState, Report

Model = TypeVar("Model", bound=nn.Module)


def patch_model(
    model: Model, config: CFLoRAConfig | None = None, *, soft_prompt: SoftPromptConfig | None = None
) -> Model:
    """Give a Hugging Face model gated low-rank updates, a soft prompt and an answer head, in place.

    Parameter names stay; new ones are `lora_a` and `lora_b` beside the weights they adapt, and `rellax.*`.
    Base weights are frozen. A model that carries PEFT LoRA keeps its own A and B.

    Args:
        model: a causal language model of transformers (Llama, Mistral, Qwen2, Qwen3 and Gemma families), or a
            PEFT model around one.
        config: None: `CFLoRAConfig()`, with rank, alpha, dropout and targets of PEFT's LoRA if there is one.
        soft_prompt: item embeddings and placeholders, or None.

    Returns:
        The same object. It has `model.rellax` with `report`, `config`, `gate_bank`, `soft_prompt` and
        `set_trainable()`, and its forward takes the arguments of `rellax.patch.forward.CausalLM.forward`.

    Raises:
        InputError: the model or a layer is of an unknown class, a target does not exist, the configuration
            contradicts PEFT's, or the model is patched already. The model is then unchanged.
    """
    return patch_layers(model, config, soft_prompt)


def patch_layers(
    model: Model,
    config: CFLoRAConfig | None,
    soft_prompt: SoftPromptConfig | None,
    only: Collection[str] | None = None,
) -> Model:
    """`patch_model`, on the linear layers of these names alone; None: on all that the configuration means."""
    for name, value, kind in (
        ("config", config, CFLoRAConfig),
        ("soft_prompt", soft_prompt, SoftPromptConfig),
    ):
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{name}: expected a {kind.__name__} or None, got {type(value).__name__}")
    inner = hf_model(model)
    if isinstance(inner, CausalLM):
        raise InputError("model: expected an unpatched one, got a patched one; call unpatch_model first")
    family = rules.find_family(inner)
    layers = inner.get_submodule(rules.LAYERS)
    attentions = [layer.get_submodule(rules.ATTENTION) for layer in layers]
    _check_model(inner, family, attentions, soft_prompt)
    found, skipped = _select(inner, family, layers, config, only)
    classes = [rules.projection_class(name, module) for name, module in found.items()]
    config = _resolve(config, found)
    state = _build_state(inner, config, found, soft_prompt)

    packed = _quantised(found)
    try:
        inner.requires_grad_(False)
        for index, (module, projection) in enumerate(zip(found.values(), classes, strict=True)):
            module.__class__ = projection
            module.adopt(config)
            module.gate_index = index
        for module in quantised.frozen(inner):
            module.__class__ = quantised.Frozen
        sets = _shared_inputs(found)
        for names in sets:
            members = [found[name] for name in names]
            for member in members:
                member.sharing = members
        for layer, block in zip(layers, attentions, strict=True):
            block.rellax_projections = [m for m in layer.modules() if isinstance(m, Projection)]
            _put_in_front(block, Attention)
        _put_in_front(inner, CausalLM)
        attention.adopt(inner.config)
        inner.rellax = state
        state.set_trainable(lora=True)
        state.report = _report(inner, skipped, sets, packed)
    except BaseException:  # such as Ctrl-C, or no memory left
        _restore(inner, state)
        raise
    return model


def unpatch_model(model: Model) -> Model:
    """Undo `patch_model`: classes, state dict, outputs and requires_grad flags as before; the same object.

    Raises:
        InputError: the model is not patched, or its modules were changed by something else since.
    """
    inner = patched_model(model)
    _check_forward(inner)
    for module in _swapped(inner):
        if "rellax_base" not in vars(type(module)):
            raise InputError(
                f"model: expected the classes patch_model gave, got {type(module)}; undo that change first"
            )
    _restore(inner, inner.rellax)
    return model


def _swapped(model: nn.Module) -> list[nn.Module]:
    ours = (CausalLM, Attention, Projection, quantised.Frozen)
    return [module for module in model.modules() if isinstance(module, ours)]


def _restore(model: Any, state: RellaxState) -> None:
    """Undo what `patch_layers` did, all of it or as far as it came."""
    for part in state.compiled:
        part._compiled_call_impl = None
    for module in _swapped(model):
        if isinstance(module, Projection):
            module.release()
        vars(module).pop("rellax_projections", None)
        module._modules.pop("rellax", None)
        module.__class__ = vars(type(module))["rellax_base"]
    attention.release(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.original_requires_grad.get(name, parameter.requires_grad))


def answer_logits(model: nn.Module, **batch: Any) -> Tensor:
    """The logits (B, 2) of [No, Yes], fp32, at the last token of each instance; without gradients.

    Padding on either side is told by `attention_mask`, packed batches by `cu_seqlens`. Labels play no part,
    and no logits over the vocabulary are made. Call `model.eval()` before, as for any prediction.

    Raises:
        InputError: the model is not patched, the batch does not fit it, or the configuration has no
            `answer_ids`.
    """
    with torch.no_grad():
        out = model(**batch, answer_only=True)
    if not isinstance(out, AnswerOutput):
        raise InputError(
            f"model: expected a patched model, got an unpatched {type(unwrapped(model)).__name__}"
        )
    assert out.answer_logits is not None, "the forward pass has asked for answer_ids"
    return out.answer_logits


def packing_pays(model: nn.Module) -> bool:
    """Whether a patched model, where and as it is now, is no slower on packed batches than on padded ones."""
    inner = unwrapped(model)
    return attention.packing_pays(inner.config, inner.get_input_embeddings().weight)


def hf_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def unwrapped(model: Any) -> Any:
    """`hf_model` of what `torch.compile` or `DistributedDataParallel` has wrapped."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif (compiled := getattr(model, "_orig_mod", None)) is not None:
            model = compiled
        else:
            return hf_model(model)


def patched_model(model: Any) -> Any:
    """The patched transformers model: the model itself, or `unwrapped`.

    Raises:
        InputError: it is not patched.
    """
    inner = unwrapped(model)
    if not isinstance(inner, CausalLM):
        raise InputError(f"model: expected a patched model, got an unpatched {type(inner).__name__}")
    return inner


def _put_in_front(module: nn.Module, mixin: Any) -> None:
    base: Any = module.__class__
    module.__class__ = _patched_class(mixin, base)


@functools.cache
def _patched_class(mixin: Any, base: Any) -> Any:
    """`base` with `mixin` in front, under its own name: transformers' registries look classes up by name."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), {**names, "__reduce_ex__": _reduce, "rellax_base": base})


def _reduce(module: Any, protocol: Any) -> Any:
    """How `copy` and `pickle` take a module of a `_patched_class` apart: by that name they find its base."""
    cls, default = type(module), nn.Module.__reduce_ex__(module, protocol)
    if "rellax_base" not in vars(cls):
        return default  # FSDP2 has put a class of its own in front
    mixin, base = cls.__bases__
    return _Maker(mixin, base, _nameless(module)), (), *default[2:]


def _nameless(module: nn.Module) -> str:
    """A class of adapted layers that `pickle` cannot find, as those of PEFT or quantised; "": none."""
    classes = {type(m) for m in module.modules() if isinstance(m, Projection)}
    found = [c.__name__ for c in classes if getattr(sys.modules[c.__module__], c.__name__, None) is not c]
    return min(found, default="")


class _Maker:
    """Makes a module of a `_patched_class` without its attributes: called by `copy`, stored by `pickle`."""

    def __init__(self, mixin: Any, base: Any, nameless: str = "") -> None:
        self.mixin, self.base, self.nameless = mixin, base, nameless

    def __call__(self) -> Any:
        attention.register()  # a process that has patched no model has not
        cls = _patched_class(self.mixin, self.base)
        return cls.__new__(cls)

    def __reduce__(self) -> Any:
        if self.nameless:
            raise InputError(
                f"model: expected adapted layers of torch to pickle, got {self.nameless}; save_adapter saves "
                "what was trained, for load_adapter on a new model"
            )
        return _Maker, (self.mixin, self.base)


def _check_model(
    model: Any, family: rules.Family, attentions: list[nn.Module], soft_prompt: SoftPromptConfig | None
) -> None:
    """Raise unless the parts that patching builds on are of the classes it knows."""
    _check_forward(model)
    embeddings, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    expected = [(block, family.attention) for block in attentions] + [(lm_head, "Linear")]
    if soft_prompt is not None:
        expected.append((embeddings, family.embedding))
    for module, name in expected:
        if type(module).__name__ != name:
            raise InputError(f"model: expected {name} in {family.model}, got {type(module).__name__}")
    if kind := quantised.describe(lm_head):
        raise InputError(f"model: expected an output layer that is not quantised, got one of {kind}")
    if problem := quantised.block_problem(model):
        raise InputError(f"model: {problem}")


def _check_forward(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise InputError(
                f"model: expected each module's own forward, got one set on {name or 'the model itself'}; "
                "take accelerate's hooks or wrappers off first (unwrap_model, remove_hook_from_module)"
            )


def _select(
    model: nn.Module,
    family: rules.Family,
    layers: Any,
    config: CFLoRAConfig | None,
    only: Collection[str] | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The linear layers to adapt by name, and those to leave alone with the reason."""
    linears = {
        f"{rules.LAYERS}.{index}.{path}": layer.get_submodule(path)
        for index, layer in enumerate(layers)
        for path in rules.PROJECTIONS
    }
    tuned = [name for name, module in model.named_modules() if rules.is_peft_layer(module)]
    if tuned:
        if stray := [name for name in tuned if name not in linears]:
            raise InputError(f"model: expected PEFT's layers among the decoder's linear layers, got {stray}")
        wanted, reason = set(tuned), "PEFT did not adapt it"
    elif only is not None:
        if stray := sorted(set(only) - linears.keys()):
            raise InputError(f"adapter: expected linear layers of {family.model}'s decoder, got {stray[0]}")
        wanted, reason = set(only), "not in the adapter"
    else:
        targets = (config or CFLoRAConfig()).target_modules
        known = [path.rsplit(".", 1)[-1] for path in rules.PROJECTIONS]
        if unknown := [target for target in targets if target not in known]:
            raise InputError(
                f"target_modules: expected names out of {known} in {family.model}, got {unknown}"
            )
        wanted = {name for name in linears if name.rsplit(".", 1)[-1] in targets}
        reason = "not in target_modules"
    found = {name: module for name, module in linears.items() if name in wanted}
    return found, {name: reason for name in linears if name not in wanted}


def _resolve(config: CFLoRAConfig | None, found: Mapping[str, Any]) -> CFLoRAConfig:
    """The configuration, with what PEFT has laid down already."""
    if not any(rules.is_peft_layer(module) for module in found.values()):
        return config or CFLoRAConfig()
    values = rules.peft_config(found)
    if config is None:
        return CFLoRAConfig(**values)
    for name, value in values.items():
        got = getattr(config, name)
        if set(got) != set(value) if name == "target_modules" else got != value:
            raise InputError(f"config.{name}: expected {value!r} as in the model's PEFT LoRA, got {got!r}")
    return replace(config, **values)


def _build_state(
    model: Any, config: CFLoRAConfig, found: Mapping[str, Any], soft_prompt: SoftPromptConfig | None
) -> RellaxState:
    vocabulary, hidden_size = model.get_output_embeddings().weight.shape
    if config.answer_ids is not None and max(config.answer_ids) >= vocabulary:
        raise InputError(
            f"answer_ids: expected ids below the vocabulary's {vocabulary}, got {config.answer_ids}"
        )
    weight = next(iter(found.values())).weight
    place = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
    gate_bank = projector = None
    if config.interaction != "none":
        gate_bank = GateBank(
            len(found), config.r, config.cond_dim, config.interaction, config.gate_init, **place
        )
    if soft_prompt is not None:
        projector = SoftPrompt(soft_prompt.item_embeddings, hidden_size, soft_prompt.placeholder_ids, **place)
    head = AnswerHead(config.answer_ids, config.loss, getattr(model.config, "final_logit_softcapping", None))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return RellaxState(config, found, gate_bank, projector, head, flags, identity(model))


def _shared_inputs(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The names of adapted layers that read the same tensor, set by set: two or more, of one dtype."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, module in found.items():
        if isinstance(module, CFLoRAUpdate):
            continue  # its product is its own, there is nothing to share
        for members in rules.SHARED_INPUTS:
            for path in members:
                if name.endswith(f".{path}"):
                    place = name.removesuffix(path), members, module.weight.dtype
                    places.setdefault(place, []).append(name)
    return [tuple(names) for names in places.values() if len(names) > 1]


def _quantised(found: Mapping[str, Any]) -> dict[str, str]:
    """What the weights of layers are quantised to, by name, where they are."""
    kinds = {
        name: quantised.describe(getattr(module, "base_layer", module)) for name, module in found.items()
    }
    return {name: kind for name, kind in kinds.items() if kind}


def _report(
    model: Any, skipped: Mapping[str, str], sets: list[tuple[str, ...]], packed: Mapping[str, str]
) -> Report:
    state: RellaxState = model.rellax
    lora = sum(p.lora_a.numel() + p.lora_b.numel() for p in state.projections.values())
    gates, soft_prompt = (
        0 if part is None else sum(p.numel() for p in part.parameters())
        for part in (state.gate_bank, state.soft_prompt)
    )
    return Report(
        model=type(model).__name__,
        patched=tuple(state.projections),
        skipped=dict(skipped),
        shared_inputs=tuple(sets),
        quantised=packed,
        lora_parameters=lora,
        gate_parameters=gates,
        soft_prompt_parameters=soft_prompt,
        base_parameters=sum(quantised.numel(p) for p in model.parameters()) - lora - gates - soft_prompt,
    )
