"""Calibration: what makes a run's probabilities honest, fitted on its validation predictions.

Temperature scaling divides the log-odds by one number T (Guo et al., On Calibration of Modern Neural
Networks, ICML 2017), and the order of the predictions, so every AUC, stays:

    P(yes) = sigmoid(l / T)

With a classical recommendation model (CRM) beside the run it is stacking (Wolpert, Stacked Generalization,
Neural Networks 1992), a logistic regression on the log-odds of both:

    P(yes) = sigmoid(w l + v l_crm + b)

Either minimises the negative log likelihood.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from rellax._files import located, read_json, sha256_file, write_json
from rellax.ctr import metrics
from rellax.ctr.crm import WEIGHTS, crm_file
from rellax.errors import InputError
from rellax.ops._check import is_number
from rellax.patch.adapter import TENSOR_FILE

logger = logging.getLogger(__name__)

FILE = "calibration.json"
LIMITS = (0.01, 100.0)
"""T stays within: without an error it would go to 0, and to infinity where predictions say nothing."""
_NUMBERS = ("weight", "crm_weight", "bias")
_FEW = 20  # samples of a label: with fewer, what is fitted to them depends much on which they are


@dataclass(frozen=True)
class Calibration:
    """P(yes) = sigmoid(weight · l + crm_weight · l_crm + bias).

    Attributes:
        weight: of a run's log-odds l; without a CRM it is 1 / T.
        crm_weight, bias: of the CRM's log-odds, and of neither; both 0 without a CRM.
        crm: folder of that CRM.
    """

    weight: float = 1.0
    crm_weight: float = 0.0
    bias: float = 0.0
    crm: str | None = None

    @property
    def temperature(self) -> float:
        return 1 / self.weight

    def apply(self, probabilities: np.ndarray, crm_probabilities: np.ndarray | None = None) -> np.ndarray:
        """Calibrated probabilities (n,); as they are where there is nothing to calibrate.

        Args:
            crm_probabilities: (n,) of the CRM, where there is one.
        """
        if self == Calibration():
            return probabilities
        if self.crm is None:
            return np.asarray(expit(logit(probabilities) * self.weight))
        assert crm_probabilities is not None, "who reads a calibration with a CRM reads the CRM as well"
        both = self.weight * _logits(probabilities) + self.crm_weight * _logits(crm_probabilities)
        return np.asarray(expit(both + self.bias))

    def to_json(self) -> dict[str, Any]:
        if self.crm is None:
            return {"temperature": self.temperature}
        return {name: getattr(self, name) for name in _NUMBERS} | {"crm": self.crm}


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """The temperature of least negative log likelihood, within `LIMITS`.

    Args:
        labels: (n,) 0 and 1.
        probabilities: (n,) of label 1, uncalibrated.

    Raises:
        InputError: the labels are all alike.
    """
    _check_labels(labels)
    # A sample's loss is the softplus of how far its logit is on the wrong side; their sum is convex in 1 / T.
    wrong = np.where(np.asarray(labels) == 1, -1.0, 1.0) * _logits(probabilities)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, wrong * math.exp(-log_temperature)).mean())

    bounds = tuple(map(math.log, LIMITS))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return Calibration(math.exp(-found.x))


def fit_stacking(
    labels: np.ndarray, probabilities: np.ndarray, crm_probabilities: np.ndarray, crm: str
) -> Calibration:
    """The logistic regression on the log-odds of a run and of the CRM in the folder `crm`.

    Args:
        labels: (n,) 0 and 1.
        probabilities, crm_probabilities: (n,) of label 1, neither of samples that it was trained on.

    Raises:
        InputError: the labels are all alike.
    """
    _check_labels(labels)
    model = LogisticRegression(C=np.inf)
    model.fit(np.stack([_logits(probabilities), _logits(crm_probabilities)], axis=1), labels)
    (weight, crm_weight), (bias,) = model.coef_[0].tolist(), model.intercept_.tolist()
    return Calibration(weight, crm_weight, bias, crm)


def write_calibration(
    run: Path,
    labels: np.ndarray,
    probabilities: np.ndarray,
    *,
    crm: str | None = None,
    crm_probabilities: np.ndarray | None = None,
) -> dict[str, Any]:
    """Fit a calibration to the validation predictions of a run, write its calibration.json, and return that.

    It holds the `temperature`, or with a CRM `weight`, `crm_weight`, `bias` and `crm`; on how many `samples`
    of which `split` it was fitted, and their `auc`, `log_loss` and `ece` `before` and `after`; the SHA-256
    of the `adapter` and of the CRM (`crm_sha256`) it belongs to.

    Raises:
        InputError: the labels are all alike, or the CRM's weights are missing.
    """
    if crm is None:
        found = fit_temperature(labels, probabilities)
    else:
        assert crm_probabilities is not None, "they come with the CRM"
        found = fit_stacking(labels, probabilities, crm_probabilities, crm)
    for doubt in _doubts(found, labels):
        logger.warning("calibrate: %s", doubt)
    before, after = (
        metrics.evaluate(labels, changed, bootstrap=0)
        for changed in (probabilities, found.apply(probabilities, crm_probabilities))
    )
    result = {
        **found.to_json(),
        "split": "valid",
        "samples": len(labels),
        **{key: {"before": before[key], "after": after[key]} for key in ("auc", "log_loss", "ece")},
        "adapter": _adapter_hash(run),
        **({} if crm is None else {"crm_sha256": _crm_hash(crm)}),
    }
    write_json(run / FILE, result)
    return result


def read_calibration(run: str | Path) -> Calibration:
    """The calibration of a run; one that changes nothing where it has not been calibrated.

    Raises:
        InputError: calibration.json is damaged, or belongs to another adapter or CRM.
    """
    path = Path(run) / FILE
    if not path.exists():
        return Calibration()
    found = read_json(path)
    calibration = calibration_of(found, path)
    if found.get("adapter") != _adapter_hash(Path(run)):
        raise InputError(
            f"{path}: expected the calibration of this run's adapter, found one of another; "
            "`rellax calibrate` makes it anew"
        )
    if calibration.crm is not None and found.get("crm_sha256") != _crm_hash(calibration.crm):
        raise InputError(
            f"{path}: expected the calibration with the model in {calibration.crm}, which has changed since; "
            "`rellax calibrate` makes it anew"
        )
    return calibration


def calibration_of(found: Any, path: Path) -> Calibration:
    """The calibration that the contents of a calibration.json are.

    Raises:
        InputError: a number or the CRM's folder is not one.
    """
    values: dict[str, Any] = found if isinstance(found, dict) else {}
    if (crm := values.get("crm")) is not None:
        for name in _NUMBERS:
            if not is_number(values.get(name)):
                raise InputError(f"{path}: expected a number for {name}, got {values.get(name)!r}")
        if not isinstance(crm, str):
            raise InputError(f"{path}: expected the folder of a model for crm, got {crm!r}")
        return Calibration(**{name: float(values[name]) for name in _NUMBERS}, crm=located(path.parent, crm))
    temperature: Any = values.get("temperature")
    if not is_number(temperature) or temperature < sys.float_info.min:
        raise InputError(f"{path}: expected a positive temperature, got {temperature!r}")
    return Calibration(1 / float(temperature))


def calibrated_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    users: np.ndarray,
    calibration: Calibration,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """What a calibration changes: itself, and `log_loss` and `ece`; with a CRM also `auc`. With intervals.

    Args:
        probabilities: (n,), calibrated.
        users: (n,), whose samples are drawn together for the intervals.
    """
    result = metrics.evaluate(labels, probabilities, users, seed=seed)
    names = ["log_loss", "log_loss_interval", "ece"]
    if calibration.crm is not None:
        names = ["auc", "auc_interval", *names]
    return calibration.to_json() | {key: result[key] for key in names}


def _doubts(found: Calibration, labels: np.ndarray) -> Iterator[str]:
    """What speaks against a calibration that was fitted to `labels`."""
    few = int(min(np.sum(labels), len(labels) - np.sum(labels)))
    if few < _FEW:
        yield f"expected at least {_FEW} validation samples of each label, got {few} of one"
    if found.crm is None:
        low, high = LIMITS
        if found.temperature < 1.01 * low:
            yield f"temperature {found.temperature:.2f} is at its limit: the run is right on every sample"
        if found.temperature > 0.99 * high:
            yield f"temperature {found.temperature:.0f} is at its limit: the run says nothing of the labels"
    for name, weight in (("the run", found.weight), ("the CRM", found.crm_weight)):
        if weight < 0:
            yield f"the weight of {name} is negative, {weight:.4f}: what it calls likely counts against a Yes"


def _check_labels(labels: np.ndarray) -> None:
    if not 0 < np.sum(labels) < len(labels):
        raise InputError(f"labels: expected both 0 and 1 to fit a calibration to, got {len(labels)} of one")


def _logits(probabilities: np.ndarray) -> np.ndarray:
    """Finite: a probability of exactly 0 or 1 counts as the nearest one that is not."""
    tiny = np.finfo(np.float64).eps
    return np.asarray(logit(np.clip(np.asarray(probabilities, np.float64), tiny, 1 - tiny)))


def _adapter_hash(run: Path) -> str:
    return sha256_file(run / "adapter" / TENSOR_FILE)


def _crm_hash(crm: str) -> str:
    return sha256_file(crm_file(crm, WEIGHTS))
