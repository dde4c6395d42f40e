"""The optimiser of a training run and its learning rate, a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rellax.ctr.config import TrainConfig

_NOT_DECAYED = ("bias", "ln_bias", "ln_weight", "b1", "b2")


def adamw(parameters: Mapping[str, Tensor], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over named parameters: matrices decay, biases and norms do not."""
    groups: list[list[Tensor]] = [[], []]
    for name, parameter in parameters.items():
        groups[name.rsplit(".", 1)[-1] in _NOT_DECAYED].append(parameter)
    decays = zip(groups, (weight_decay, 0.0), strict=True)
    return torch.optim.AdamW([{"params": group, "weight_decay": decay} for group, decay in decays if group])


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of a step: rises linearly over the first `warmup` of all steps, then follows `schedule`."""
    warm = config.warmup * steps
    rise = (step + 1) / warm if warm else 1.0
    left = min((steps - step) / (steps - warm), 1.0)
    fall = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[config.schedule]
    return config.peak_lr * min(rise, fall)
