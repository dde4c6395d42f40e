"""The optimiser of a training run and its learning rate, a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rellax.ctr.config import TrainConfig

_NOT_DECAYED = ("bias", "ln_bias", "ln_weight", "b1", "b2")


def adamw(parameters: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over named parameters: matrices decay, biases and norms do not.

    Each of its groups has a `share`: its learning rate over that of `learning_rate`.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if name.rsplit(".", 1)[-1] in _NOT_DECAYED else config.weight_decay
        own = config.soft_prompt_lr if ".soft_prompt." in name else None
        share = 1.0 if own is None else own / config.peak_lr
        groups.setdefault((decay, share), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "share": share} for (decay, share), group in groups.items()]
    )


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of a step: rises linearly over the first `warmup` of all steps, then follows `schedule`."""
    warm = config.warmup * steps
    rise = (step + 1) / warm if warm else 1.0
    left = min((steps - step) / (steps - warm), 1.0)
    fall = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[config.schedule]
    return config.peak_lr * min(rise, fall)
