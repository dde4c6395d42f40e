"""Save and load what was trained: a folder of safetensors and JSON, nothing pickled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rellax._files import atomic_folder, read_json, sha256_file, write_json
from rellax.errors import InputError
from rellax.patch import peft_files
from rellax.patch.config import CFLoRAConfig, SoftPromptConfig
from rellax.patch.engine import patch_layers, patched_model, unpatch_model, unwrapped
from rellax.patch.forward import CausalLM
from rellax.patch.identity import identity, is_other
from rellax.patch.rules import find_family

FORMAT = 1
CONFIG_FILE = "adapter.json"
TENSOR_FILE = "adapter.safetensors"
SUBFOLDER = "rellax"  # of what a patched model's `save_pretrained` writes
_TABLE = "rellax.soft_prompt.item_embeddings"
_PARTS = {"rellax.gate_bank.": "gates", "rellax.soft_prompt.": "soft prompt"}  # what an adapter may lack

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write A, B, the gate bank and the soft prompt (with its item table) of a patched model to a folder.

    Beside the tensors lies a JSON file with the configuration and a description of the base model, whose own
    weights are not saved: its sizes, hashes of samples, and if it is from the hub its name and commit. The
    two belong together, so they have a folder of their own: it is written under a temporary name and replaces
    an older one, and a reader meets one or the other, never a mixture.

    Args:
        model: a patched model.
        folder: a new folder, or one of nothing but an adapter.

    Raises:
        InputError: the model is not patched, its gates are PEFT's to save, or `folder` is a file, the current
            folder, or holds something else. Nothing is touched then.
    """
    inner = patched_model(model)
    if _is_saved_by_peft(inner):
        raise InputError("model: expected one of patch_model, got one of CFLoraConfig, which PEFT saves")
    _write(inner, folder, _tensors(inner))


def save_beside(model: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write a patched model's adapter to where `load_adapter` finds it in the folder of the whole model.

    Args:
        state_dict: has the values to save, where the model's own are shards; where these lack some of the
            adapter's, nothing is written.
    """
    tensors = _tensors(model)
    values = tensors if state_dict is None else state_dict
    if tensors.keys() <= values.keys() and not _is_saved_by_peft(model):
        _write(model, Path(folder) / SUBFOLDER, {name: values[name] for name in tensors})


def _is_saved_by_peft(model: Any) -> bool:
    return model.rellax.active_bank() is not model.rellax.gate_bank


def _write(model: Any, folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    state = model.rellax
    with atomic_folder(folder, own=(CONFIG_FILE, TENSOR_FILE)) as part:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # save_file reports a full disk as an error of its own
        (part / TENSOR_FILE).write_bytes(save(tensors))
        write_json(
            part / CONFIG_FILE,
            {
                "format": FORMAT,
                "base_model": _describe(model),
                "base_weights": state.base_weights,
                "config": state.config.to_dict(),
                "placeholder_ids": _placeholder_ids(model),
                "sha256": sha256_file(part / TENSOR_FILE),
            },
        )


def load_adapter(model: Model, folder: str | Path, *, partial: bool = False) -> Model:
    """Load an adapter's folder: patch an unpatched model with it, or replace a patched one's tensors.

    An unpatched model gets exactly the adapter's layers, also where they are of some decoder layers only.
    A LoRA that PEFT's `save_pretrained` wrote is an adapter without gates and soft prompt: of stage 1.

    Args:
        model: the same base model as the adapter was made for, patched or not.
        folder: written by `save_adapter`, by a patched model's `save_pretrained` (or `Trainer`), or by PEFT.
        partial: allow a patched model to have gates or a soft prompt that the adapter lacks; they stay as
            they are. So a second stage starts from the LoRA of the first.

    Returns:
        The same object.

    Warns:
        UserWarning: the adapter was trained on other base weights, or with another loss than the patched
            model's.

    Raises:
        InputError: a file is missing or damaged, or the adapter belongs to another model, rank, set of layers
            or pair of answers, or is one of PEFT's that is more than plain LoRA. The model is then unchanged.
    """
    inner, folder = unwrapped(model), _adapter_folder(folder)
    find_family(inner)
    placeholder_ids, loss = None, None
    if peft_files.is_peft(folder):
        values, tensors = peft_files.read(folder)
        config = CFLoRAConfig(**values, interaction="none")
    else:
        description, tensors = _read(folder)
        if description["base_model"] != (base := _describe(inner)):
            raise InputError(f"adapter: expected one of {base}, got one of {description['base_model']}")
        config = CFLoRAConfig.from_dict(description["config"])
        placeholder_ids, loss = description["placeholder_ids"], config.loss
        if is_other(known := description.get("base_weights", {}), _base_weights(inner)):
            name = f" ({known['name']} at {known['commit']})" if "name" in known and "commit" in known else ""
            warnings.warn(
                f"adapter: expected the base weights that it was trained on{name}, got others", stacklevel=2
            )
    _check(config, tensors)
    if isinstance(inner, CausalLM):
        _load(inner, config, placeholder_ids, tensors, partial)
        if loss not in (None, own := inner.rellax.config.loss):
            warnings.warn(f"adapter: expected one trained with loss {own!r}, got {loss!r}", stacklevel=2)
        return model
    soft_prompt = None
    if placeholder_ids is not None:
        soft_prompt = SoftPromptConfig(tensors[_TABLE], placeholder_ids)
    patch_layers(model, config, soft_prompt, _layers(tensors))
    try:
        _load(inner, config, placeholder_ids, tensors, partial=False)
    except BaseException:
        unpatch_model(model)
        raise
    return model


def is_of_other_weights(model: nn.Module, folder: str | Path) -> bool:
    """Whether an adapter fits a model but is known to have been trained on other base weights.

    Raises:
        InputError: its description is missing or damaged.
    """
    inner, folder = unwrapped(model), _adapter_folder(folder)
    if peft_files.is_peft(folder):
        return False
    description = _read_description(folder)
    known = description.get("base_weights", {})
    return description["base_model"] == _describe(inner) and is_other(known, _base_weights(inner))


def export_peft(adapter: str | Path, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the A and B of an adapter as plain LoRA for `peft.PeftModel.from_pretrained`.

    PEFT then computes what the patched model does without `instance_embed` and `item_ids`.

    Args:
        adapter: a folder of `save_adapter`, or of a patched model's `save_pretrained`.
        folder: a new one, or one of nothing but such an adapter; written as by `save_adapter`.
        base_model: folder or hub name of the model it was trained for, to be noted; None: the name that the
            adapter has noted of a model from the hub.

    Warns:
        UserWarning: the adapter has gates or a soft prompt, which plain LoRA has no place for.

    Raises:
        InputError: a file is missing or damaged, or `folder` is a file, the current folder, or holds
            something else. Nothing is touched then.
    """
    description, tensors = _read(_adapter_folder(adapter))
    config = CFLoRAConfig.from_dict(description["config"])
    _check(config, tensors)
    layers = _layers(tensors)
    if len(layers) / len(config.target_modules) != description["base_model"].get("layers"):
        config = replace(config, target_modules=layers)  # of some decoder layers only
    lora = {name: tensor for name, tensor in tensors.items() if name.endswith((".lora_a", ".lora_b"))}
    dropped = [word for part, word in _PARTS.items() if any(name.startswith(part) for name in tensors)]
    if dropped:
        warnings.warn(
            f"{folder}: plain LoRA has no {' and no '.join(dropped)}, which are dropped: PEFT will not "
            "predict what the patched model does",
            stacklevel=2,
        )
    base_model = base_model or description.get("base_weights", {}).get("name")
    peft_files.write(folder, config.to_dict(), lora, base_model)


def _describe(model: Any) -> dict[str, Any]:
    """What tells base models apart without reading their weights."""
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape
    return {
        "class": getattr(type(model), "rellax_base", type(model)).__name__,  # FSDP2 has put its own in front
        "hidden_size": hidden_size,
        "layers": model.config.num_hidden_layers,
        "vocab_size": vocab_size,
    }


def _base_weights(model: Any) -> dict[str, str]:
    """The `identity` of a model's base weights, patched or not."""
    return model.rellax.base_weights if isinstance(model, CausalLM) else identity(model)


def _placeholder_ids(model: Any) -> list[int] | None:
    soft_prompt = model.rellax.soft_prompt
    return None if soft_prompt is None else soft_prompt.placeholder_ids.tolist()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Everything an adapter consists of, by name; the tensors are the model's own."""
    tensors = {f"rellax.{name}": tensor for name, tensor in model.rellax.state_dict().items()}
    for name, projection in model.rellax.projections.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = projection.lora_a, projection.lora_b
    return tensors


def _adapter_folder(folder: str | Path) -> Path:
    """The folder itself, or the one in it that `save_pretrained` has written."""
    folder = Path(folder)
    inner = folder / SUBFOLDER
    return inner if (inner / CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file() else folder


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    description = _read_description(folder)
    file = folder / TENSOR_FILE
    if file.is_file() and sha256_file(file) != description["sha256"]:
        raise InputError(f"{file}: damaged, its SHA-256 is not the one in {CONFIG_FILE}")
    tensors = peft_files.read_tensors(file)
    if (description["placeholder_ids"] is None) is (_TABLE in tensors):
        raise InputError(f"{folder}: expected placeholder_ids and {_TABLE} both or neither")
    return description, tensors


def _read_description(folder: Path) -> dict[str, Any]:
    description = read_json(folder / CONFIG_FILE)
    keys = {"format", "base_model", "config", "placeholder_ids", "sha256"}
    is_whole = isinstance(description, dict) and keys <= description.keys()
    if not is_whole or not isinstance(description["base_model"], dict):
        raise InputError(f"{folder / CONFIG_FILE}: expected the fields {sorted(keys)} of an adapter")
    if type(description["format"]) is not int or description["format"] != FORMAT:
        raise InputError(f"{folder / CONFIG_FILE}: expected format {FORMAT}, got {description['format']!r}")
    known = description.get("base_weights", {})
    if not isinstance(known, dict) or not all(isinstance(value, str) for value in known.values()):
        raise InputError(f"{folder / CONFIG_FILE}: base_weights: expected strings by name, got {known!r}")
    _check_placeholder_ids(folder / CONFIG_FILE, description["placeholder_ids"])
    return description


def _check_placeholder_ids(path: Path, ids: Any) -> None:
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise InputError(f"{path}: placeholder_ids: expected a list of token ids or null, got {ids!r}")


def _layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that an adapter adapts."""
    return [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]


def _check(config: CFLoRAConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless layers and sizes are those that the configuration says; nothing is allocated before."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_a") and tensor.dim()}
    if ranks != {config.r}:
        raise InputError(f"adapter: expected lora_a of rank r = {config.r}, got {sorted(ranks)}")
    targets = {layer.rpartition(".")[2] for layer in _layers(tensors)}
    if targets != set(config.target_modules):
        raise InputError(
            f"adapter: expected layers named {sorted(config.target_modules)}, got {sorted(targets)}"
        )
    norm = tensors.get("rellax.gate_bank.ln_weight")
    if norm is not None and norm.shape[-1:] != (config.cond_dim,):
        raise InputError(
            f"adapter: expected gates for cond_dim = {config.cond_dim}, got shape {tuple(norm.shape)}"
        )
    if config.interaction != "none" and not any(name.startswith("rellax.gate_bank.") for name in tensors):
        raise InputError(f"adapter: expected gates for interaction {config.interaction!r}, it lacks them")


def _load(
    model: Any,
    config: CFLoRAConfig,
    placeholder_ids: list[int] | None,
    tensors: dict[str, Tensor],
    partial: bool,
) -> None:
    """Copy the tensors into a patched model, after everything has been compared."""
    may_lack = [part for part in _PARTS if partial and not any(name.startswith(part) for name in tensors)]
    targets = {name: t for name, t in _tensors(model).items() if not name.startswith(tuple(may_lack))}
    peft_files.check_same("adapter", tensors, targets)
    if config.alpha != (alpha := model.rellax.config.alpha):
        raise InputError(f"adapter: expected one with alpha = {alpha:g}, got {config.alpha:g}")
    answers = model.rellax.config.answer_ids
    if None not in (answers, config.answer_ids) and config.answer_ids != answers:
        raise InputError(f"adapter: expected one with answer_ids {answers}, got {config.answer_ids}")
    if _TABLE in tensors and placeholder_ids != (own := _placeholder_ids(model)):
        raise InputError(f"adapter: expected one with placeholder_ids {own}, got {placeholder_ids}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
