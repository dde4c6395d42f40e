"""CFLoRA as a method of PEFT: `get_peft_model(model, CFLoraConfig(…))`, saved and loaded by PEFT itself.

The model is then a patched one: its forward takes what `rellax.patch.forward.CausalLM.forward` does, such as
`instance_embed`. The method has a PEFT type of its own, "CFLORA". So PEFT refuses its checkpoints where this
module has not been imported, instead of loading them as plain LoRA; and a tensor that a checkpoint lacks is
an error here, where PEFT would warn and leave the gates as they were made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rellax.errors import InputError
from rellax.nn import GateBank
from rellax.patch import rules
from rellax.patch.config import CFLoRAConfig
from rellax.patch.engine import patch_model, unpatch_model
from rellax.patch.forward import CausalLM
from rellax.patch.peft_files import check_same
from rellax.patch.state import RellaxState

if not hasattr(LoraModel, "_remap_adapter_state_dict_for_load"):
    raise InputError(f"peft: CFLoraConfig needs version 0.21 or newer, got {peft.__version__}")


_SHARED = ("target_modules", "exclude_modules", "layers_to_transform", "loss", "answer_ids")
_MORE_THAN_LORA = ("rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "layer_replication")


class PeftType(str, Enum):
    """What adapter_config.json calls the method."""

    CFLORA = "CFLORA"


@dataclass
class CFLoraConfig(LoraConfig):
    """`peft.LoraConfig` with an r x r matrix of interactions per instance between the components (CFLoRA).

    All adapters of a model adapt the same layers, each with one rank and scale.

    Args:
        cond_dim: d_u, the size of an instance embedding, `instance_embed` (B, d_u) of the model's forward.
        interaction, gate_init, loss, answer_ids: as in `rellax.CFLoRAConfig`, but the loss is "vocab" by
            default, which needs no answer_ids.

    Raises:
        InputError: a value is out of range or unknown.
    """

    cond_dim: int = field(default=64)
    interaction: str = field(default="full")
    gate_init: str = field(default="identity")
    loss: str = field(default="vocab")
    answer_ids: Any = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CFLORA
        own = ("r", "cond_dim", "interaction", "gate_init", "loss", "answer_ids")
        checked = CFLoRAConfig(**{name: getattr(self, name) for name in own})
        for name in own:
            setattr(self, name, getattr(checked, name))
        for each in fields(self):
            value = getattr(self, each.name)
            if each.metadata.get("is_lora_variant") or each.name in _MORE_THAN_LORA:
                is_used = bool(value)
            else:
                is_used = value in each.metadata.get("lora_variants", ())
            if is_used:
                raise InputError(f"{each.name}: expected nothing beside CFLoRA's gates, got {value!r}")


class Gates(nn.Module, BaseTunerLayer):
    """The gate banks of a model's adapters; which is active and trained is PEFT's to say, as for A and B."""

    adapter_layer_names = ("lora_gates",)

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lora_gates = nn.ModuleDict()
        self._active_adapter = layer.active_adapter
        self._beside = (layer,)  # in a tuple, which registers no module

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        if adapter_name in self.lora_gates:
            self.lora_gates[adapter_name].to(device or self._beside[0].weight.device)


class State(RellaxState):
    """`model.rellax` with a gate bank for each adapter of PEFT."""

    gates: Gates

    def active_bank(self) -> GateBank | None:
        active = self.gates.active_adapters
        banks: Any = self.gates.lora_gates
        return banks[active[0]] if len(active) == 1 and active[0] in banks else None


class CFLoraModel(LoraModel):
    """PEFT's tuner: injects LoRA as ever, patches the model with the first adapter, adds each one's gates."""

    tuner_layer_cls: Any = BaseTunerLayer

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        rules.find_family(model)
        for name, other in self.peft_config.items():
            for shared in _SHARED:
                one, another = getattr(config, shared), getattr(other, shared)
                if other is not config and one != another:
                    raise InputError(f"{shared}: expected {another!r} as in adapter {name!r}, got {one!r}")
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not isinstance(model, CausalLM):
            _patch(model, config)
        if config.interaction != "none":
            _add_gates(model.rellax, adapter_name, config)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise: a weighted sum of gated updates is no gated update."""
        raise InputError("model: expected adapters without gates to be combined, CFLoRA's cannot be")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: Any,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's own, which takes every tensor with another adapter's name in its own for that adapter's."""
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        found = {_without_prefix(name) for name in tensors}
        if missing := _own(map(_without_prefix, model.state_dict()), adapter_name) - found:
            raise InputError(
                f"adapter_name: expected names that are no part of a parameter's, got {adapter_name!r} "
                f"beside {unwanted_adapter_names}: PEFT takes {min(missing)} for another's"
            )
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own, after which nothing of the adapter may be missing, left over, or of another shape."""
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        found = {_without_prefix(name): tensor for name, tensor in tensors.items()}
        known = {_without_prefix(name): tensor for name, tensor in model.state_dict().items()}
        targets = _own(known, adapter_name) | (found.keys() & known.keys())
        check_same("adapter", found, {name: known[name] for name in targets})
        return tensors

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        configs: Any = self.peft_config.values()
        if any(config.interaction != "none" for config in configs):
            raise InputError("model: expected an adapter without gates to merge, they differ from row to row")

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        unpatch_model(self.model)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def _patch(model: Any, config: CFLoraConfig) -> None:
    """Patch a model in which PEFT has put its layers; what is trained stays as it is."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = {name: module for name, module in model.named_modules() if rules.is_peft_layer(module)}
    wanted = {"interaction": "none", "loss": config.loss, "answer_ids": config.answer_ids}
    patch_model(model, CFLoRAConfig(**rules.peft_config(layers), **wanted))
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    model.rellax.__class__ = State
    model.rellax.gates = Gates(next(iter(layers.values())))


def _add_gates(state: State, name: str, config: CFLoraConfig) -> None:
    """A gate bank for an adapter, trained if its A is."""
    layer = next(iter(state.projections.values()))
    bank = GateBank(
        len(state.projections),
        config.r,
        config.cond_dim,
        config.interaction,
        config.gate_init,
        device=layer.weight.device,
        dtype=torch.promote_types(layer.weight.dtype, torch.float32),
    )
    state.gates.lora_gates[name] = bank.requires_grad_(layer.lora_A[name].weight.requires_grad)


def _own(names: Iterable[str], adapter: str) -> set[str]:
    """Those of a state dict's names that belong to an adapter."""
    pattern = re.compile(rf".*\.lora_(A|B|gates)\.{re.escape(adapter)}\..+")
    return {name for name in names if pattern.fullmatch(name)}


def _without_prefix(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _register() -> None:
    """Enter the method where PEFT looks methods up; its `register_peft_method` takes its own names alone."""
    name: Any = PeftType.CFLORA
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = CFLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = CFLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = "lora_"


_register()
