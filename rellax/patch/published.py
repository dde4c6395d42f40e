"""Import of checkpoints of the published ReLLaX (arXiv:2501.13344; code: github.com/LaVieEnRose365/ReLLaX).

Its second stage saves, by `torch.save`, the state dict of a model that holds a PEFT-wrapped Llama as `LM`:

    LM.base_model.model.model.layers.<i>.self_attn.<q|v>_proj.lora_gate.<0|1|3>.<weight|bias>
    ctr_input_embedding_prj.<0|2>.<weight|bias>

`lora_gate` is Sequential(LayerNorm(d_u), Linear(d_u, 2r²), GELU, Linear(2r², r²)), and its output, as r x r,
stands on the right of a row vector, as it does here. `ctr_input_embedding_prj` is Sequential(Linear(E, d),
GELU, Linear(d, d)), the projector of soft prompts. A and B are not in it: they are those of the first stage,
a file of PEFT's names (`base_model.model.….lora_A.weight`). Neither holds the recommendation model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rellax.errors import InputError
from rellax.patch.engine import unwrapped
from rellax.patch.forward import CausalLM
from rellax.patch.peft_files import check_same, read_tensors

Model = TypeVar("Model", bound=nn.Module)

_LAYER = r"(?:_orig_mod\.|module\.)*(?:LM\.)?(?:base_model\.model\.)?(?P<layer>model\.layers\.\d+\..+)"
_GATE = re.compile(_LAYER + r"\.lora_gate\.(?P<part>[013]\.(?:weight|bias))")
_LORA = re.compile(_LAYER + r"\.lora_(?P<part>[AB])\.(?:default\.)?weight")
_PROJECTOR = re.compile(r"(?:_orig_mod\.|module\.)*ctr_input_embedding_prj\.(?P<part>[02]\.(?:weight|bias))")
_BANK = {
    "0.weight": "ln_weight",
    "0.bias": "ln_bias",
    "1.weight": "w1",
    "1.bias": "b1",
    "3.weight": "w2",
    "3.bias": "b2",
}


def load_published(model: Model, gates: str | Path, *, lora: str | Path | None = None) -> Model:
    """Load a checkpoint of the published ReLLaX into a patched model.

    Args:
        model: patched with `interaction="full"`, the checkpoint's r, alpha (2 r there), target_modules and
            cond_dim (d_u), and, if the checkpoint has a projector, with a soft prompt (E from its items).
        gates: its pytorch_model.bin or .safetensors, of stage 2.
        lora: A and B, the pytorch_model.bin, adapter_model.bin or .safetensors of stage 1; None: `gates`
            holds them too, or they are loaded by other means.

    Returns:
        The same object.

    Raises:
        InputError: a file is missing or damaged, or holds more, less or something else than the model has.
            The model is then unchanged.
    """
    inner = unwrapped(model)
    if not isinstance(inner, CausalLM) or inner.rellax.gate_bank is None:
        raise InputError('model: expected one that was patched with interaction="full"')
    if inner.rellax.gate_bank.interaction != "full":
        raise InputError(f"model: expected interaction 'full', got {inner.rellax.gate_bank.interaction!r}")
    targets, found = _targets(inner), _found(Path(gates))
    if not any(".lora_gate." in name for name in found):
        raise InputError(f"{gates}: expected tensors named lora_gate.N, got none")
    with_lora = lora is not None or any(name.endswith((".lora_A", ".lora_B")) for name in found)
    if lora is not None:
        found |= {name: t for name, t in _found(Path(lora)).items() if name.endswith((".lora_A", ".lora_B"))}
    if not with_lora:
        targets = {name: t for name, t in targets.items() if not name.endswith((".lora_A", ".lora_B"))}
    check_same(gates, found, targets)
    with torch.no_grad():
        for name, tensor in found.items():
            targets[name].copy_(tensor)
    return model


def _targets(model: Any) -> dict[str, Tensor]:
    """The tensors of a patched model, by the names that a checkpoint has for them."""
    state, targets = model.rellax, dict[str, Tensor]()
    for index, (name, projection) in enumerate(state.projections.items()):
        for part, field in _BANK.items():
            targets[f"{name}.lora_gate.{part}"] = getattr(state.gate_bank, field)[index]
        targets[f"{name}.lora_A"], targets[f"{name}.lora_B"] = projection.lora_a, projection.lora_b
    if state.soft_prompt is not None:
        for name, tensor in state.soft_prompt.projector.named_parameters():
            targets[f"ctr_input_embedding_prj.{name}"] = tensor
    return targets


def _found(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, by the names of `_targets`; others keep their own."""
    tensors = {}
    for name, tensor in read_tensors(path).items():
        if gate := _GATE.fullmatch(name):
            name = f"{gate['layer']}.lora_gate.{gate['part']}"
        elif lora := _LORA.fullmatch(name):
            name = f"{lora['layer']}.lora_{lora['part']}"
        elif projector := _PROJECTOR.fullmatch(name):
            name = f"ctr_input_embedding_prj.{projector['part']}"
        tensors[name] = tensor
    return tensors
