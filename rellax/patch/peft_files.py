"""Folders of LoRA as PEFT's `save_pretrained` writes them, read and written without PEFT.

What an adapter is follows from its tensors. Its configuration adds how they are scaled, and whatever makes it
more than plain LoRA, which is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rellax._files import atomic_folder, read_json, write_json
from rellax.errors import InputError, one_line
from rellax.ops._check import is_number

CONFIG_FILE = "adapter_config.json"
TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # the latter from before safetensors

_PREFIX = "base_model.model."
_MATRICES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
_NAMES = re.compile(rf"{re.escape(_PREFIX)}(.+)\.(lora_[AB]\.weight)")
_KNOWN = {  # fields that are used, or change nothing about what the tensors mean
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("inference_mode", "bias", "init_lora_weights", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config"),
    *("loftq_config", "ensure_weight_tying", "runtime_config"),
}
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base weights as well


def is_peft(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of PEFT."""
    return (Path(folder) / CONFIG_FILE).is_file()


def tensor_file(folder: str | Path) -> Path:
    """The file of an adapter's tensors, or where it should be."""
    paths = [Path(folder) / name for name in TENSOR_FILES]
    return next((path for path in paths if path.is_file()), paths[0])


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A PEFT LoRA: r, alpha, dropout and target_modules as of `CFLoRAConfig`, and its tensors.

    alpha is the one with which alpha / r is the adapter's own scale, whatever rsLoRA and patterns made of it.
    The tensors are `<layer>.lora_a` (r, d_in) and `<layer>.lora_b` (d_out, r).

    Raises:
        InputError: a file is missing or damaged, or the adapter is not plain LoRA of one rank and scale.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE, maker="PEFT")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{folder / CONFIG_FILE}: expected an adapter with peft_type LORA, got {got!r}")
    _check_plain(config, folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(tensor_file(folder)).items():
        matched = _NAMES.fullmatch(name)
        if matched is None or tensor.dim() != 2:
            raise InputError(f"{folder}: expected nothing but lora_A and lora_B of linear layers, got {name}")
        tensors[f"{matched[1]}.{_MATRICES[matched[2]]}"] = tensor
    return _shared_values(config, tensors, folder), tensors


def write(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base_model: str | None = None,
) -> None:
    """Write `<layer>.lora_a` and `<layer>.lora_b` for `PeftModel.from_pretrained`; the inverse of `read`.

    Args:
        folder: written under a temporary name, replaces an older one of nothing but these two files.
        config: has r, alpha, dropout and target_modules.
        base_model: folder or hub name of the model they were trained for.
    """
    names = {ours: theirs for theirs, ours in _MATRICES.items()}
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, matrix = name.rpartition(".")
        renamed[f"{_PREFIX}{layer}.{names[matrix]}"] = tensor.detach().cpu().contiguous()
    alpha = float(config["alpha"])
    with atomic_folder(folder, own=(CONFIG_FILE, TENSOR_FILES[0])) as part:
        save_file(renamed, part / TENSOR_FILES[0], metadata={"format": "pt"})
        write_json(
            part / CONFIG_FILE,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base_model,
                "inference_mode": True,
                "r": config["r"],
                "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
                "lora_dropout": config["dropout"],
                "target_modules": sorted(config["target_modules"]),
                "bias": "none",
            },
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one of `torch.save`, read with weights_only.

    Raises:
        InputError: it is missing, damaged, or holds something else than finite floating numbers.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a file of tensors, found none")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: expected a file of nothing but tensors, found another ({one_line(error)})"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{path}: expected a dictionary of tensors, got {type(found).__name__}")
    for name, tensor in found.items():
        if not _is_finite(tensor):
            raise InputError(
                f"{path}: expected finite floating numbers as {name}, got others ({tensor.dtype})"
            )
    return found


def _is_finite(tensor: Tensor) -> bool:
    try:
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        return tensor.is_floating_point() and bool(torch.isfinite(wide).all())
    except RuntimeError:  # a dtype or a layout that torch hardly knows
        return False


def check_same(where: str | Path, found: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Raise unless the tensors that `where` holds have the names and shapes of the model's, `targets`."""
    if missing := sorted(targets.keys() - found.keys()):
        raise InputError(f"{where}: expected {missing[0]}, it lacks that tensor ({len(missing)} in all)")
    if unknown := sorted(found.keys() - targets.keys()):
        raise InputError(f"{where}: expected no {unknown[0]}, the model lacks it ({len(unknown)} in all)")
    if wrong := sorted(name for name in found if found[name].shape != targets[name].shape):
        want, got = (tuple(tensors[wrong[0]].shape) for tensors in (targets, found))
        raise InputError(f"{where}: expected {wrong[0]} of shape {want}, got {got} ({len(wrong)} in all)")


def effective_alpha(scale: float, r: int) -> float:
    """The alpha with which alpha / r is this scale."""
    return float(f"{scale * r:.12g}")


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("bias", "none") != "none":
        raise InputError(f"{folder}: expected LoRA with bias='none', got {config['bias']!r}")
    if (init := config.get("init_lora_weights", True)) not in _HARMLESS_INITS:
        raise InputError(
            f"{folder}: expected LoRA on the base weights as they are, got init_lora_weights={init!r}, which "
            "changes them; PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) converts it"
        )
    for name, value in config.items():
        if name not in _KNOWN and value not in (None, False, 0, "", [], {}):
            raise InputError(f"{folder}: expected plain LoRA, got {name}={value!r}")


def _alphas(config: Mapping[str, Any], folder: Path) -> list[tuple[re.Pattern[str], float]]:
    """Patterns of layers' names with their alpha: the first that fits counts, the last fits all."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{folder}: expected numbers by pattern as alpha_pattern, got {patterns!r}")
    alpha, dropout = config.get("lora_alpha", 8), config.get("lora_dropout", 0.0)
    for name, value in [("lora_alpha", alpha), ("lora_dropout", dropout), *patterns.items()]:
        if not is_number(value):
            raise InputError(f"{folder}: expected a number as {name}, got {value!r}")
    try:
        found = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{folder}: expected regular expressions in alpha_pattern, got others ({one_line(error)})"
        ) from None
    return [*found, (re.compile(""), alpha)]


def _shared_values(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """What all layers have in common."""
    alphas, found = _alphas(config, folder), set()
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    for layer in layers:
        pair = [tensors.get(f"{layer}.{matrix}") for matrix in _MATRICES.values()]
        if pair[0] is None or pair[1] is None or pair[0].shape[0] != pair[1].shape[1] or not len(pair[0]):
            raise InputError(f"{folder}: expected lora_A (r, d_in) and lora_B (d_out, r) of {layer}")
        r = pair[0].shape[0]
        alpha = next(alpha for pattern, alpha in alphas if pattern.match(layer))
        found.add((r, effective_alpha(alpha / (math.sqrt(r) if config.get("use_rslora") else r), r)))
    if len(found) != 1:
        raise InputError(
            f"{folder}: expected one (r, alpha) in all layers, got {sorted(found) or 'no layers'}"
        )
    r, alpha = found.pop()
    targets = dict.fromkeys(layer.rpartition(".")[2] for layer in layers)
    return {
        "r": r,
        "alpha": alpha,
        "dropout": config.get("lora_dropout", 0.0),
        "target_modules": tuple(targets),
    }
