"""Save and load what was trained: a folder of safetensors and JSON, nothing pickled."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rellax._files import atomic_folder, read_json, sha256_file, write_json
from rellax.errors import InputError, one_line
from rellax.patch import peft_files
from rellax.patch.config import CFLoRAConfig, SoftPromptConfig
from rellax.patch.engine import hf_model, patch_model, patched_model, unpatch_model
from rellax.patch.forward import CausalLM
from rellax.patch.rules import find_family

FORMAT = 1
CONFIG_FILE = "adapter.json"
TENSOR_FILE = "adapter.safetensors"
_TABLE = "rellax.soft_prompt.item_embeddings"
_PARTS = ("rellax.gate_bank.", "rellax.soft_prompt.")  # what a partial adapter may lack

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write A, B, the gate bank and the soft prompt (with its item table) of a patched model to a folder.

    Beside the tensors lies a JSON file with the configuration and a description of the base model, whose own
    weights are not saved. The folder is written under a temporary name and replaces an older one.

    Raises:
        InputError: the model is not patched, or its gates are PEFT's to save.
    """
    inner = patched_model(model)
    if inner.rellax.active_bank() is not inner.rellax.gate_bank:
        raise InputError("model: expected one of patch_model, got one of CFLoraConfig, which PEFT saves")
    state = inner.rellax
    with atomic_folder(folder) as part:
        tensors = {name: t.detach().cpu().contiguous() for name, t in _tensors(inner).items()}
        (part / TENSOR_FILE).write_bytes(
            save(tensors)
        )  # save_file reports a full disk as an error of its own
        write_json(
            part / CONFIG_FILE,
            {
                "format": FORMAT,
                "base_model": _describe(inner),
                "config": state.config.to_dict(),
                "placeholder_ids": _placeholder_ids(inner),
                "sha256": sha256_file(part / TENSOR_FILE),
            },
        )


def load_adapter(model: Model, folder: str | Path, *, partial: bool = False) -> Model:
    """Load an adapter's folder: patch an unpatched model with it, or replace a patched one's tensors.

    A LoRA that PEFT's `save_pretrained` wrote is an adapter without gates and soft prompt: of stage 1.

    Args:
        model: the same base model as the adapter was made for, patched or not.
        folder: written by `save_adapter`, or by PEFT.
        partial: allow a patched model to have gates or a soft prompt that the adapter lacks; they stay as
            they are. So a second stage starts from the LoRA of the first.

    Returns:
        The same object.

    Raises:
        InputError: a file is missing or damaged, or the adapter belongs to another model, rank or set of
            layers, or is one of PEFT's that is more than plain LoRA. The model is then unchanged.
    """
    inner = hf_model(model)
    find_family(inner)
    placeholder_ids = None
    if peft_files.is_peft(folder):
        values, tensors = peft_files.read(folder)
        config = CFLoRAConfig(**values, interaction="none")
    else:
        description, tensors = _read(Path(folder))
        if description["base_model"] != (own := _describe(inner)):
            raise InputError(f"adapter: expected one of {own}, got one of {description['base_model']}")
        config = CFLoRAConfig.from_dict(description["config"])
        placeholder_ids = description["placeholder_ids"]
    _check_sizes(config, tensors)
    if isinstance(inner, CausalLM):
        _load(inner, config, placeholder_ids, tensors, partial)
        return model
    soft_prompt = None
    if placeholder_ids is not None:
        soft_prompt = SoftPromptConfig(tensors[_TABLE], placeholder_ids)
    patch_model(model, config, soft_prompt=soft_prompt)
    try:
        _load(inner, config, placeholder_ids, tensors, partial=False)
    except BaseException:
        unpatch_model(model)
        raise
    return model


def export_peft(adapter: str | Path, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the A and B of an adapter as plain LoRA for `peft.PeftModel.from_pretrained`.

    PEFT then computes what the patched model does without `instance_embed` and `item_ids`.

    Args:
        adapter: a folder of `save_adapter`.
        folder: written under a temporary name, replaces an older adapter.
        base_model: folder or hub name of the model it was trained for, to be noted.

    Warns:
        UserWarning: the adapter has gates or a soft prompt, which plain LoRA has no place for.

    Raises:
        InputError: a file is missing or damaged, or `folder` holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not peft_files.is_peft(folder):
        raise InputError(f"{folder}: expected a new folder, or an adapter of PEFT's, found something else")
    description, tensors = _read(Path(adapter))
    lora = {name: tensor for name, tensor in tensors.items() if name.endswith((".lora_a", ".lora_b"))}
    words = {"rellax.gate_bank.": "gates", "rellax.soft_prompt.": "soft prompt"}
    dropped = [words[part] for part in _PARTS if any(name.startswith(part) for name in tensors)]
    if dropped:
        warnings.warn(
            f"{folder}: plain LoRA has no {' and no '.join(dropped)}, which are dropped: PEFT will not "
            "predict what the patched model does",
            stacklevel=2,
        )
    peft_files.write(folder, description["config"], lora, base_model)


def _describe(model: Any) -> dict[str, Any]:
    """What tells base models apart without reading their weights."""
    vocab_size, hidden_size = model.get_input_embeddings().weight.shape
    return {
        "class": getattr(type(model), "rellax_base", type(model)).__name__,  # FSDP2 has put its own in front
        "hidden_size": hidden_size,
        "layers": model.config.num_hidden_layers,
        "vocab_size": vocab_size,
    }


def _placeholder_ids(model: Any) -> list[int] | None:
    soft_prompt = model.rellax.soft_prompt
    return None if soft_prompt is None else soft_prompt.placeholder_ids.tolist()


def _tensors(model: Any) -> dict[str, Tensor]:
    """Everything an adapter consists of, by name; the tensors are the model's own."""
    tensors = {f"rellax.{name}": tensor for name, tensor in model.rellax.state_dict().items()}
    for name, projection in model.rellax.projections.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = projection.lora_a, projection.lora_b
    return tensors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    description = read_json(folder / CONFIG_FILE)
    keys = {"format", "base_model", "config", "placeholder_ids", "sha256"}
    if not isinstance(description, dict) or not keys <= description.keys():
        raise InputError(f"{folder / CONFIG_FILE}: expected the fields {sorted(keys)} of an adapter")
    if type(description["format"]) is not int or description["format"] != FORMAT:
        raise InputError(f"{folder / CONFIG_FILE}: expected format {FORMAT}, got {description['format']!r}")
    file = folder / TENSOR_FILE
    if not file.is_file():
        raise InputError(f"{file}: expected the adapter's tensors, found no such file")
    if sha256_file(file) != description["sha256"]:
        raise InputError(f"{file}: damaged, its SHA-256 is not the one in {CONFIG_FILE}")
    try:
        tensors = load_file(file)
    except (
        SafetensorError,
        KeyError,
        ValueError,
        RuntimeError,
    ) as error:  # KeyError: a dtype of a later version
        raise InputError(f"{file}: expected safetensors, but it is damaged ({one_line(error)})") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise InputError(
                f"{file}: expected finite floating numbers as {name}, got others ({tensor.dtype})"
            )
    _check_placeholder_ids(folder / CONFIG_FILE, description["placeholder_ids"])
    if (description["placeholder_ids"] is None) is (_TABLE in tensors):
        raise InputError(f"{folder}: expected placeholder_ids and {_TABLE} both or neither")
    return description, tensors


def _check_placeholder_ids(path: Path, ids: Any) -> None:
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise InputError(f"{path}: placeholder_ids: expected a list of token ids or null, got {ids!r}")


def _check_sizes(config: CFLoRAConfig, tensors: dict[str, Tensor]) -> None:
    """Raise unless the tensors are as large as the configuration says, which nothing allocates before."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_a") and tensor.dim()}
    if ranks != {config.r}:
        raise InputError(f"adapter: expected lora_a of rank r = {config.r}, got {sorted(ranks)}")
    norm = tensors.get("rellax.gate_bank.ln_weight")
    if norm is not None and norm.shape[-1:] != (config.cond_dim,):
        raise InputError(
            f"adapter: expected gates for cond_dim = {config.cond_dim}, got shape {tuple(norm.shape)}"
        )
    if config.interaction != "none" and not any(name.startswith(_PARTS[0]) for name in tensors):
        raise InputError(f"adapter: expected gates for interaction {config.interaction!r}, it lacks them")


def _load(
    model: Any,
    config: CFLoRAConfig,
    placeholder_ids: list[int] | None,
    tensors: dict[str, Tensor],
    partial: bool,
) -> None:
    """Copy the tensors into a patched model, after everything has been compared."""
    targets = _tensors(model)
    may_lack = [part for part in _PARTS if partial and not any(name.startswith(part) for name in tensors)]
    expected = {name for name in targets if not name.startswith(tuple(may_lack))}
    if missing := sorted(expected - tensors.keys()):
        raise InputError(f"adapter: expected {missing[0]}, it lacks that tensor ({len(missing)} in all)")
    if unknown := sorted(tensors.keys() - expected):
        raise InputError(f"adapter: expected no {unknown[0]}, the model lacks it ({len(unknown)} in all)")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != targets[name].shape:
            want, got = tuple(targets[name].shape), tuple(tensor.shape)
            raise InputError(f"adapter: expected {name} of shape {want}, got {got}")
    if config.alpha != (alpha := model.rellax.config.alpha):
        raise InputError(f"adapter: expected one with alpha = {alpha:g}, got {config.alpha:g}")
    if _TABLE in tensors and placeholder_ids != (own := _placeholder_ids(model)):
        raise InputError(f"adapter: expected one with placeholder_ids {own}, got {placeholder_ids}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
