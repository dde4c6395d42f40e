"""Configurations: what their values may be, and runs that other versions have made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rellax.ctr.config import DemoConfig, StudyConfig, TrainConfig
from rellax.errors import InputError

FOLDERS: dict[str, Any] = {"data": "data", "model": "llm", "prompts": "recent"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lr", "alpha", "weight_decay", "clip", "warmup"])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected a finite number, got {value}$"):
        TrainConfig(**FOLDERS, **{name: value})


@pytest.mark.parametrize("config", [DemoConfig, StudyConfig])
def test_numbers_of_a_comparison_are_finite(config: type[DemoConfig] | type[StudyConfig]) -> None:
    with pytest.raises(InputError, match=r"^lr2: expected a finite number, got nan$"):
        config(lr2=math.nan)
