"""Configurations of a patched model that are none: one sentence, the model unchanged."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from test_patch import snapshot

from rellax.errors import InputError
from rellax.patch import CFLoRAConfig, SoftPromptConfig, answer_logits, patch_model

TABLE = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"r": 3}}, "config: expected a CFLoRAConfig or None, got dict"),
        ({"soft_prompt": TABLE}, "soft_prompt: expected a SoftPromptConfig or None, got Tensor"),
    ],
)
def test_what_is_no_configuration(options: dict[str, Any], message: str) -> None:
    model = tiny.base_model()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        patch_model(model, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "ids", [5, None, (), (3, 3), (-1,), (1.5,), (True,), (2**70,), "", "ab", torch.tensor([5])]
)
def test_placeholders_that_are_no_tokens(ids: Any) -> None:
    with pytest.raises(InputError, match="placeholder_ids: expected distinct token ids, got "):
        SoftPromptConfig(TABLE, ids)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), 10**400, True, "6"])
def test_alphas_that_scale_nothing(alpha: Any) -> None:
    with pytest.raises(InputError, match="alpha: expected a positive number, got "):
        CFLoRAConfig(alpha=alpha)


def test_numbers_of_numpy_are_taken() -> None:
    """And become Python's, which JSON can hold."""
    given = CFLoRAConfig(
        r=np.int64(8),
        alpha=np.float32(16),
        dropout=np.float64(0.5),
        cond_dim=np.uint8(3),
        answer_ids=(np.int64(1), np.int64(2)),
    )
    plain = CFLoRAConfig(r=8, alpha=16, dropout=0.5, cond_dim=3, answer_ids=(1, 2))
    assert given == plain
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
    ids = SoftPromptConfig(TABLE, (np.int64(5), np.int32(3))).placeholder_ids
    assert json.dumps(ids) == "[5, 3]"


def test_answers_of_a_model_that_is_not_patched() -> None:
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(
        InputError, match="model: expected a patched model, got an unpatched LlamaForCausalLM"
    ):
        answer_logits(tiny.base_model(), input_ids=ids)
