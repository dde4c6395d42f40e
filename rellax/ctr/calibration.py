"""Temperature scaling: one number, fitted on the validation predictions, that makes probabilities honest.

    P(yes) = sigmoid((l_yes - l_no) / T)

T minimises the negative log likelihood (Guo et al., On Calibration of Modern Neural Networks, ICML 2017). The
order of the predictions, and so every AUC, stays.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from rellax._files import read_json, sha256_file, write_json
from rellax.ctr import metrics
from rellax.errors import InputError

FILE = "calibration.json"
LIMITS = (0.01, 100.0)
"""T stays within: without an error it would go to 0, and to infinity where predictions say nothing."""


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature of least negative log likelihood, within `LIMITS`.

    Args:
        labels: (n,) 0 and 1.
        probabilities: (n,) of label 1, uncalibrated.

    Raises:
        InputError: the labels are all alike.
    """
    if not 0 < np.sum(labels) < len(labels):
        raise InputError(f"labels: expected both 0 and 1 to fit a temperature to, got {len(labels)} of one")
    # A sample's loss is the softplus of how far its logit is on the wrong side; their sum is convex in 1 / T.
    wrong = np.where(np.asarray(labels) == 1, -1.0, 1.0) * _logits(probabilities)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, wrong * math.exp(-log_temperature)).mean())

    bounds = tuple(map(math.log, LIMITS))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x)


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (n,) with their logits divided by `temperature`; at 1 they are returned as they are."""
    if temperature == 1.0:
        return probabilities
    return np.asarray(expit(logit(probabilities) / temperature))


def write_calibration(run: Path, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Fit a temperature to the validation predictions of a run, write its calibration.json, and return that.

    It holds the `temperature`; on how many `samples` of which `split` it was fitted, and their `log_loss` and
    `ece` `before` and `after`; `adapter`, the SHA-256 of the adapter it belongs to.

    Raises:
        InputError: the labels are all alike.
    """
    temperature = fit_temperature(labels, probabilities)
    before, after = (
        metrics.evaluate(labels, at_temperature(probabilities, t), bootstrap=0) for t in (1.0, temperature)
    )
    result = {
        "temperature": temperature,
        "split": "valid",
        "samples": len(labels),
        **{key: {"before": before[key], "after": after[key]} for key in ("log_loss", "ece")},
        "adapter": _adapter_hash(run),
    }
    write_json(run / FILE, result)
    return result


def read_temperature(run: str | Path) -> float:
    """The temperature of a run; 1 where it has not been calibrated.

    Raises:
        InputError: calibration.json is damaged, or belongs to another adapter.
    """
    path = Path(run) / FILE
    if not path.exists():
        return 1.0
    found = read_json(path)
    temperature = found.get("temperature") if isinstance(found, dict) else None
    if not isinstance(temperature, int | float) or temperature is True or not 0 < temperature < math.inf:
        raise InputError(f"{path}: expected a positive temperature, got {temperature!r}")
    if found.get("adapter") != _adapter_hash(Path(run)):
        raise InputError(
            f"{path}: expected the calibration of this run's adapter, found one of another; "
            "`rellax calibrate` makes it anew"
        )
    return float(temperature)


def calibrated_metrics(
    labels: np.ndarray, probabilities: np.ndarray, temperature: float, *, seed: int = 0
) -> dict[str, Any]:
    """What a temperature changes: `temperature`, `log_loss` with its interval, and `ece`."""
    result = metrics.evaluate(labels, at_temperature(probabilities, temperature), seed=seed)
    return {"temperature": temperature} | {
        key: result[key] for key in ("log_loss", "log_loss_interval", "ece")
    }


def _logits(probabilities: np.ndarray) -> np.ndarray:
    """Finite: a probability of exactly 0 or 1 counts as the nearest one that is not."""
    tiny = np.finfo(np.float64).eps
    return np.asarray(logit(np.clip(probabilities, tiny, 1 - tiny)))


def _adapter_hash(run: Path) -> str:
    return sha256_file(run / "adapter" / "adapter.safetensors")
