"""What a patched model is to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rellax.errors import InputError
from rellax.nn.answer import check_answer_ids
from rellax.nn.cflora import check_lora
from rellax.nn.gate_bank import GATE_INITS, INTERACTIONS
from rellax.nn.soft_prompt import check_item_embeddings, check_placeholder_ids
from rellax.ops._check import check_count
from rellax.ops.answer import LOSSES


@dataclass(frozen=True)
class CFLoRAConfig:
    """Low-rank updates and their gates.

    Args:
        r: rank; kernels of a GPU take up to 64.
        alpha: updates are scaled by alpha / r.
        dropout: probability of dropping an element on its way into A, in [0, 1).
        target_modules: names of the decoder's linear layers to adapt; every layer's is.
        cond_dim: d_u, the size of an instance embedding.
        interaction: "full": an r x r matrix per instance; "diagonal": one factor per component; "none": no
            gates, plain LoRA.
        gate_init: "identity": start as plain LoRA; "kaiming": as published.
        loss: "choice": binary cross-entropy over the two answers; "vocab": cross-entropy over the vocabulary.
        answer_ids: (no_id, yes_id), the token ids of the two answers; None where nothing needs them.

    Raises:
        InputError: a value is out of range or unknown.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    cond_dim: int = 64
    interaction: str = "full"
    gate_init: str = "identity"
    loss: str = "choice"
    answer_ids: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        names = self.target_modules
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not names or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"target_modules: expected names of layers, got {self.target_modules!r}")
        check_lora(self.r, self.alpha, self.dropout)
        check_count("cond_dim", self.cond_dim)
        choices = {"interaction": (*INTERACTIONS, "none"), "gate_init": GATE_INITS, "loss": LOSSES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        if self.answer_ids is not None:
            object.__setattr__(self, "answer_ids", check_answer_ids(self.answer_ids))
        kinds = {"r": int, "alpha": float, "dropout": float, "target_modules": tuple, "cond_dim": int}
        for name, kind in kinds.items():  # what JSON takes
            object.__setattr__(self, name, kind(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CFLoRAConfig:
        """The inverse of `to_dict`; `InputError` for an unknown field."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping):
            raise InputError(f"CFLoRAConfig: expected fields out of {sorted(known)}, got {values!r}")
        if unknown := sorted(set(values) - known):
            raise InputError(f"CFLoRAConfig: expected fields out of {sorted(known)}, got {unknown}")
        return cls(**values)


@dataclass(frozen=True)
class SoftPromptConfig:
    """Soft prompt augmentation.

    Args:
        item_embeddings: (N, E) floating, the recommendation model's item table.
        placeholder_ids: token ids that stand for an item.

    Raises:
        InputError: not a finite matrix, or no valid ids.
    """

    item_embeddings: Tensor
    placeholder_ids: Sequence[int]

    def __post_init__(self) -> None:
        check_item_embeddings(self.item_embeddings)
        if not torch.isfinite(self.item_embeddings).all():
            raise InputError("item_embeddings: expected finite numbers, got NaN or infinity")
        object.__setattr__(self, "placeholder_ids", check_placeholder_ids(self.placeholder_ids))
