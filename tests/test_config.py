"""Configurations: what their values may be, and runs that other versions have made."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rellax.ctr.config import CRMConfig, DemoConfig, StudyConfig, TrainConfig, read_config
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": 0.0}, "clip: expected a positive number, got 0.0"),
        ({"eval_batch_size": 0}, "eval_batch_size: expected a positive number or None, got 0"),
    ],
)
def test_values_of_a_training_run(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        TrainConfig(**FOLDERS, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": math.nan}, "lr: expected a finite number, got nan"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"batch_size": 0}, "batch_size: expected a positive number or None, got 0"),
        ({"regularizer": -1e-5}, "regularizer: expected zero or more, got -1e-05"),
        ({"hidden": (8, 0)}, "hidden: expected at least one width, all of them positive, got 8, 0"),
    ],
)
def test_values_of_a_classical_model(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        CRMConfig(**changes)


def finished(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text("{}")
    return folder


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Whose configuration lacks what has been added since."""
    config = TrainConfig(**FOLDERS, k=3)
    written = config.to_json() | {"inputs": {}}
    assert read_config(finished(tmp_path, written)) == config
    for name in ("schedule", "target_modules", "quantize"):
        del written[name]
    assert read_config(finished(tmp_path, written)) == config


def test_a_run_of_a_later_version_says_so(tmp_path: Path) -> None:
    config = TrainConfig(**FOLDERS).to_json() | {"inputs": {}, "optimiser": "lion", "beta": 0.5}
    words = "this version of rellax or an earlier one, found the unknown beta, optimiser$"
    with pytest.raises(InputError, match=words):
        read_config(finished(tmp_path, config))


@pytest.mark.parametrize("config", [asdict(CRMConfig()), {"data": "data", "model": "llm", "dim": 8}, []])
def test_a_run_of_another_kind_says_so(tmp_path: Path, config: Any) -> None:
    with pytest.raises(InputError, match=r"expected the configuration of `rellax train`, found another$"):
        read_config(finished(tmp_path, config))
