"""Loads the language model and its tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import logging as python_logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)
from transformers.utils import logging

from rellax._files import sha256_file
from rellax.ctr.runs import has_bfloat16
from rellax.errors import InputError
from rellax.patch import quantised

_GROUP = 32  # weights that share a scale, where they have 4 bits


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model; `name` is a folder, or a name on the hub.

    Raises:
        InputError: there is none.
    """
    return _load(AutoTokenizer, name)


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    device: torch.device | str = "cpu",
) -> Any:
    """A Hugging Face causal language model, in evaluation mode.

    Args:
        name: a folder, or a name on the hub.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the hardware multiplies it, else float32.
        quantize: what the decoder's linear layers are quantised to on their way in: "none"; by bitsandbytes
            "int8" (LLM.int8), "nf4" or "fp4" (QLoRA); by torchao "int8wo", "int4wo", "float8wo" (weights
            alone) or "int8dq" (activations too, on the fly).
        device: where it is quantised, and then is; a model that is not is on the CPU, to be moved.

    Raises:
        InputError: there is none, its files are damaged, the package that quantises is missing, or its layers
            have sizes that cannot be quantised so.
    """
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16() else "float32"
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantize == "none":
        return _load(AutoModelForCausalLM, name, **options)
    options |= {
        "quantization_config": _quantization(quantize, options["dtype"]),
        "device_map": {"": str(device)},
    }
    try:
        model = _load(AutoModelForCausalLM, name, **options)
    except (RuntimeError, ImportError) as error:
        raise InputError(
            f"quantize: {str(name)!r} cannot be quantised to {quantize!r}; for one, layers must read a "
            f"multiple of {_GROUP} values ({str(error).splitlines()[0]})"
        ) from error
    if problem := quantised.block_problem(model):
        raise InputError(f"quantize: {problem}")
    return model


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input alone, and compute the layer again in the backward pass."""
    name = "activation_checkpointing_enable"  # gradient_checkpointing_enable before transformers 5.24
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    """What transformers takes for a kind of quantisation."""
    package = "bitsandbytes" if kind in ("int8", "nf4", "fp4") else "torchao"
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"quantize: {kind!r} needs {package}, which is not installed; pip install 'rellax[quant]'"
        )
    if package == "bitsandbytes":
        if kind == "int8":
            # It says once a product that it computes in fp16.
            python_logging.getLogger("bitsandbytes.autograd._functions").setLevel(python_logging.ERROR)
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
    from torchao import quantization as ao

    int4: Any = getattr(torch, "int4")  # noqa: B009  torch's stubs lack it
    if kind == "int4wo":  # of torchao's layouts of 4 bits the one that every device has
        return TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=ao.PerGroup(_GROUP)))
    kinds = {
        "int8wo": ao.Int8WeightOnlyConfig,
        "int8dq": ao.Int8DynamicActivationInt8WeightConfig,
        "float8wo": ao.Float8WeightOnlyConfig,
    }
    return TorchAoConfig(kinds[kind]())


def load_encoder(name: str | Path) -> Any:
    """A Hugging Face model of any kind, as the class it was saved from, in the dtype of :func:`load_model`.

    Raises:
        InputError: there is none, or its files are damaged.
    """
    saved_from = (load_config(name).architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, saved_from, AutoModel)
    return _load(model_class, name, dtype=torch.bfloat16 if has_bfloat16() else torch.float32)


def load_config(name: str | Path) -> Any:
    """The configuration of a Hugging Face model.

    Raises:
        InputError: there is none.
    """
    return _load(AutoConfig, name)


def model_hash(name: str | Path) -> str:
    """SHA-256 of all files of a model's folder; for a name on the hub, the commit it stands for.

    Raises:
        InputError: there is no such model.
    """
    if not Path(name).is_dir():
        return str(load_config(name)._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(name).iterdir() if path.is_file()):
        digest.update(f"{path.name}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()


def resolve_device(name: str) -> torch.device:
    """The device of "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        InputError: another name, or "cuda" where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected one that is there, got 'cuda' without a CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _load(auto_class: Any, name: str | Path, **options: Any) -> Any:
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        causal = auto_class in (AutoModelForCausalLM, AutoTokenizer)
        kind = "causal language model" if causal else "language model"
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model: expected a folder with a {kind}, or its name on a hub that can be "
            f"reached, got {str(name)!r} ({reason})"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
