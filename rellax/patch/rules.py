"""What can be patched: model families, and classes of linear layers. To support another family, add a row."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rellax.errors import InputError
from rellax.nn.cflora import CFLoRALinear, CFLoRAUpdate
from rellax.patch import quantised
from rellax.patch.config import CFLoRAConfig
from rellax.patch.forward import Projection
from rellax.patch.peft_files import effective_alpha

LAYERS = "model.layers"  # path from a model to its decoder layers
ATTENTION = "self_attn"  # path from a decoder layer to its attention block
PROJECTIONS = (  # paths from a decoder layer to its linear layers; the last part is what a target names
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SHARED_INPUTS = (  # those of them that read the same tensor
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
_PEFT_LORA = "peft.tuners.lora."  # its layers: other methods of PEFT call theirs Linear as well
_PEFT_LINEARS = ("Linear", "Linear8bitLt", "Linear4bit", "TorchaoLoraLinear")


@dataclass(frozen=True)
class Family:
    """Classes of a model's parts, by their names in transformers.

    Attributes:
        model: the causal language model's class.
        attention: the class of a decoder layer's attention block.
        embedding: the class of the word embeddings; a scaled one has its factor in `embed_scale`.
    """

    model: str
    attention: str
    embedding: str = "Embedding"


FAMILIES = (
    Family("LlamaForCausalLM", "LlamaAttention"),  # SmolLM2 and Vicuna too
    Family("MistralForCausalLM", "MistralAttention"),
    Family("Qwen2ForCausalLM", "Qwen2Attention"),
    Family("Qwen3ForCausalLM", "Qwen3Attention"),
    Family("GemmaForCausalLM", "GemmaAttention", "GemmaTextScaledWordEmbedding"),
    Family("Gemma2ForCausalLM", "Gemma2Attention", "Gemma2TextScaledWordEmbedding"),
    Family("Gemma3ForCausalLM", "Gemma3Attention", "Gemma3TextScaledWordEmbedding"),
)


def find_family(model: nn.Module) -> Family:
    """The row for a model's class.

    Raises:
        InputError: no row fits; lists what is supported and what came.
    """
    got = type(model)
    for family in FAMILIES:
        if got.__name__ == family.model and got.__module__.startswith("transformers.models."):
            return family
    supported = ", ".join(family.model for family in FAMILIES)
    raise InputError(
        f"model: expected one of {supported} of transformers, got {got.__module__}.{got.__qualname__}"
    )


class PatchedLinear(Projection, CFLoRALinear):
    """An `nn.Linear` that got A and B of its own."""

    rellax_base = nn.Linear

    def adopt(self, config: CFLoRAConfig) -> None:
        super().adopt(config)
        self.add_lora(config.r, config.alpha, config.dropout)

    def release(self) -> None:
        super().release()
        self.remove_lora()


@functools.cache
def _patched_quantised_linear(layer: Any) -> type[Projection]:
    class PatchedQuantisedLinear(CFLoRAUpdate, PatchedLinear, layer):
        """A linear layer with a quantised weight that got A and B of its own."""

        rellax_base = layer

        def base(self, x: Tensor) -> Tensor:
            return quantised.product(functools.partial(layer.forward, self), self.weight, x)

    return PatchedQuantisedLinear


@functools.cache
def _patched_peft_linear(layer: Any) -> type[Projection]:
    class PatchedPeftLinear(Projection, layer):
        """PEFT's LoRA layer, whose A, B, scaling and dropout of the active adapter are used in place."""

        rellax_base = layer

        def adopt(self, config: CFLoRAConfig) -> None:
            super().adopt(config)
            self.is_gated = config.interaction != "none"

        def release(self) -> None:
            super().release()
            self.__dict__.pop("is_gated", None)

        @property
        def lora_a(self) -> Tensor:
            return self.lora_A[self.active_adapters[0]].get_parameter("weight")

        @property
        def lora_b(self) -> Tensor:
            return self.lora_B[self.active_adapters[0]].get_parameter("weight")

        @property
        def scale(self) -> float:
            return self.scaling[self.active_adapters[0]]

        @property
        def dropout(self) -> float:
            return getattr(self.lora_dropout[self.active_adapters[0]], "p", 0.0)

        def is_adapted(self) -> bool:
            """Whether PEFT would add to the base layer's output now."""
            return not self.disable_adapters and any(name in self.r for name in self.active_adapters)

        def likeness(self) -> tuple[Any, ...] | None:
            return super().likeness() if self.is_adapted() else None

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            if self.merged:
                raise InputError("model: expected PEFT's adapter unmerged, it was merged after patching")
            if not self.is_adapted():
                self.receive(None)
                return self.base(x)
            if problem := _adapter_problem(self):
                raise InputError(f"model: expected plain LoRA of PEFT on a linear layer, got {problem}")
            return super().forward(x)

        def merge(self, *args: Any, **kwargs: Any) -> None:
            self._check_ungated()
            super().merge(*args, **kwargs)

        def unload_and_optionally_merge_module(self, merge: bool, **options: Any) -> nn.Module:
            """What PEFT asks a layer that is to become its base layer for."""
            self._check_ungated()
            if merge:
                self.merge(**options)
            return self.get_base_layer()

        def _check_ungated(self) -> None:
            if self.is_gated:
                raise InputError(
                    "model: expected an adapter without gates to merge or unload, they differ from row to "
                    "row; call rellax.unpatch_model first"
                )

        def base(self, x: Tensor) -> Tensor:
            return quantised.product(self.base_layer, self.base_layer.weight, x)

    return PatchedPeftLinear


@functools.cache
def _patched_quantised_peft_linear(layer: Any) -> type[Projection]:
    return type(
        "PatchedQuantisedPeftLinear", (CFLoRAUpdate, _patched_peft_linear(layer)), {"rellax_base": layer}
    )


def is_peft_layer(module: nn.Module) -> bool:
    """Whether PEFT put this module in place of another."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def projection_class(name: str, module: Any) -> type[Projection]:
    """The class that the linear layer `name` gets.

    Raises:
        InputError: the layer is of another class than those that can be adapted.
    """
    layer: Any = type(module)
    if is_peft_layer(module):
        if problem := _peft_problem(module):
            raise InputError(f"{name}: expected plain LoRA of PEFT on a linear layer, got {problem}")
        if quantised.describe(module.base_layer):
            return _patched_quantised_peft_linear(layer)
        return _patched_peft_linear(layer)
    if quantised.describe(module):
        return _patched_quantised_linear(layer)
    if layer is nn.Linear:
        return PatchedLinear
    raise InputError(
        f"{name}: expected nn.Linear, a quantised one of bitsandbytes or torchao, or PEFT's LoRA on one, "
        f"got {layer.__module__}.{layer.__qualname__}"
    )


def _peft_problem(module: Any) -> str:
    layer, base = type(module), module.get_base_layer()
    is_lora = layer.__module__.startswith(_PEFT_LORA) and layer.__name__ in _PEFT_LINEARS
    if not is_lora or not (type(base) is nn.Linear or quantised.describe(base)):
        return f"{layer.__module__}.{layer.__qualname__} on {type(base).__qualname__}"
    return _adapter_problem(module)


def _adapter_problem(module: Any) -> str:
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.r:
        return f"active adapters {active} where one is expected"
    if module.merged:
        return "an adapter merged into the base weights"
    if module.lora_variant.get(active[0]) is not None:
        return f"the variant {type(module.lora_variant[active[0]]).__name__}"
    if module.lora_bias[active[0]] or module.fan_in_fan_out:
        return "lora_bias or fan_in_fan_out"
    return ""


def peft_config(projections: Mapping[str, Any]) -> dict[str, Any]:
    """r, alpha, dropout and target_modules of PEFT layers that are to be taken over.

    Raises:
        InputError: the layers differ, one gate bank cannot serve several ranks.
    """
    found = set()
    for module in projections.values():
        adapter = module.active_adapters[0]
        r = module.r[adapter]
        alpha = effective_alpha(module.scaling[adapter], r)  # rsLoRA scales by another power of r
        found.add((r, alpha, getattr(module.lora_dropout[adapter], "p", 0.0)))
    if len(found) != 1:
        raise InputError(
            f"model: expected one (r, alpha, dropout) in all of PEFT's layers, got {sorted(found)}"
        )
    r, alpha, dropout = found.pop()
    targets = dict.fromkeys(name.rsplit(".", 1)[-1] for name in projections)
    return {"r": r, "alpha": alpha, "dropout": dropout, "target_modules": tuple(targets)}
