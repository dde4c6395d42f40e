"""What tells a base model's weights from others of the same shapes, wherever they were loaded from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rellax.patch.rules import LAYERS, PROJECTIONS

_SAMPLES = 256  # of each weight
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # and no path


def identity(model: Any) -> dict[str, str]:
    """Of an unpatched model; what cannot be told is left out.

    `name` and `commit` are those of a model from the hub: a local folder's name says nothing elsewhere.
    `embeddings` and `layers` are hashes of samples of the words' weights and of the decoder's linear layers,
    in bfloat16: they are the same for a model in fp32 and in bf16, from a GGUF file, a folder or the hub.
    Layers that are quantised, and weights in fp16, of which rounding has made others, have none.
    """
    found, name = {}, str(model.config._name_or_path)
    if (commit := getattr(model.config, "_commit_hash", None)) and _HUB_NAME.fullmatch(name):
        found = {"name": name, "commit": str(commit)}
    words = [model.get_input_embeddings(), model.get_output_embeddings()]
    linears = [layer.get_submodule(path) for layer in model.get_submodule(LAYERS) for path in PROJECTIONS]
    for part, modules in (("embeddings", words), ("layers", linears)):
        weights = [getattr(getattr(module, "base_layer", module), "weight", None) for module in modules]
        if all(map(_is_comparable, weights)):
            found[part] = _hash(weights)
    return found


def is_other(found: Mapping[str, str], own: Mapping[str, str]) -> bool:
    """Whether two identities are of different weights, by the best that is known of both."""
    for parts in (("layers",), ("embeddings",), ("name", "commit")):
        if all(part in known for part in parts for known in (found, own)):
            return any(found[part] != own[part] for part in parts)
    return False


def _is_comparable(weight: Any) -> bool:
    """Whether these are plain weights in memory: no shards, and nothing that packs them."""
    plain = type(weight) in (nn.Parameter, Tensor) and not weight.is_meta and weight.numel() > 0
    return plain and weight.dtype in (torch.bfloat16, torch.float32, torch.float64)


def _hash(weights: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for weight in weights:
        place = torch.arange(_SAMPLES, device=weight.device) * (weight.numel() - 1) // (_SAMPLES - 1)
        sample = weight.detach().flatten()[place].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
