"""Loads the language model and its tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from rellax._files import sha256_file
from rellax.ctr.runs import has_bfloat16
from rellax.errors import InputError


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model; `name` is a folder, or a name on the hub.

    Raises:
        InputError: there is none.
    """
    return _load(AutoTokenizer, name)


def load_model(name: str | Path, *, dtype: str = "auto") -> Any:
    """A Hugging Face causal language model on the CPU, in evaluation mode.

    Args:
        name: a folder, or a name on the hub.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the hardware multiplies it, else float32.

    Raises:
        InputError: there is none, or its files are damaged.
    """
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16() else "float32"
    return _load(AutoModelForCausalLM, name, dtype=getattr(torch, dtype))


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
