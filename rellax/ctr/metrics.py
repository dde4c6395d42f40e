"""Metrics of click-through-rate predictions, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from rellax.errors import InputError

ECE_BINS = 10
_CHUNK = 1 << 22  # resampled values in memory at once


def evaluate(
    labels: np.ndarray,
    probabilities: np.ndarray,
    users: np.ndarray | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of `probabilities` (n,) against `labels` (n,) in {0, 1}, as a JSON-ready dictionary.

    Keys:
        samples, positives: counts.
        auc, log_loss (nats), acc (threshold 0.5); and auc_interval, log_loss_interval, acc_interval: 95 %
            percentile intervals over `bootstrap` resamplings, None with `bootstrap=0`. With `users` whole
            users are drawn: samples of one are not independent (Davison & Hinkley, 1997, section 3.8). Of a
            single user there is nothing to draw: None.
        ece: expected calibration error, 10 bins of equal width.
        gauc: only with `users` (n,); the AUC within each user who has both classes, weighted by samples.

    `auc` and `gauc` are None where one class is absent.

    Raises:
        InputError: lengths differ, nothing to evaluate, labels other than 0 and 1, probabilities off [0, 1].
    """
    labels, probabilities = _checked(labels, probabilities)
    result: dict[str, Any] = {
        "samples": len(labels),
        "positives": int(labels.sum()),
        "auc": _auc(labels, probabilities),
        "log_loss": float(log_loss(labels, probabilities, labels=[0, 1])),
        "acc": float(accuracy_score(labels, probabilities >= 0.5)),
        "ece": ece(labels, probabilities),
    }
    if users is not None:
        result["gauc"] = _gauc(labels, probabilities, np.asarray(users))
    drawn = bootstrap and not _is_one(users)
    intervals = _intervals(labels, probabilities, users, bootstrap, seed) if drawn else {}
    return result | {f"{key}_interval": intervals.get(key) for key in ("auc", "log_loss", "acc")}


def paired_bootstrap(
    labels: np.ndarray,
    p_a: np.ndarray,
    p_b: np.ndarray,
    users: np.ndarray | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """AUC of `p_a` minus AUC of `p_b` on the same samples, each resampling applied to both.

    Args:
        labels: (n,) in {0, 1}.
        p_a, p_b: probabilities (n,), or (runs, n): then the AUC is the mean of the runs' AUCs.
        users: (n,), whose samples are drawn together, as in `evaluate`; None draws single samples.

    Returns:
        `difference`, its 95 % percentile `interval`, `share_above_zero` of the resamplings, and the two-sided
        `p_value`, twice the share on the rarer side of zero (Efron & Tibshirani, 1993, section 16.4), which
        cannot be less than 2 / (bootstrap + 1); all None where one class is absent, or `users` are one.

    Raises:
        InputError: as in `evaluate`.
    """
    runs_a, runs_b = ([_checked(labels, p) for p in np.atleast_2d(p)] for p in (p_a, p_b))
    labels = runs_a[0][0]
    if _is_one(users) or not 0 < labels.sum() < len(labels):
        return {"difference": None, "interval": None, "share_above_zero": None, "p_value": None}
    draws = []
    for weights in _resamplings(labels, users, bootstrap, seed):
        a, b = (
            np.mean([_weighted_auc(labels, p, weights) for _, p in runs], axis=0) for runs in (runs_a, runs_b)
        )
        draws.append(a - b)
    differences = np.concatenate(draws)
    differences = differences[np.isfinite(differences)]
    rarer = min(np.sum(differences <= 0), np.sum(differences >= 0))
    means = [np.mean([roc_auc_score(labels, p) for _, p in runs]) for runs in (runs_a, runs_b)]
    return {
        "difference": float(means[0] - means[1]),
        "interval": _percentiles(differences),
        "share_above_zero": float(np.mean(differences > 0)),
        "p_value": float(min(1.0, 2 * (rarer + 1) / (len(differences) + 1))),
    }


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != probabilities.shape or not len(labels):
        raise InputError(
            "probabilities: expected as many as labels, and at least one, "
            f"got shapes {probabilities.shape} and {labels.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise InputError(f"labels: expected 0 and 1, got {labels[~np.isin(labels, (0, 1))][0]}")
    outside = ~((probabilities >= 0) & (probabilities <= 1))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise InputError(f"probabilities: expected values in [0, 1], got {probabilities[row]} at {row}")
    return labels.astype(np.int64), probabilities


def _auc(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    both = 0 < labels.sum() < len(labels)
    return float(roc_auc_score(labels, probabilities)) if both else None


def ece_bins(probabilities: np.ndarray) -> np.ndarray:
    """Which of the `ECE_BINS` bins of equal width each probability is in."""
    return np.minimum((probabilities * ECE_BINS).astype(np.int64), ECE_BINS - 1)


def ece(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error: mean distance of the share of Yes in a bin from its mean probability."""
    gaps = np.bincount(ece_bins(probabilities), weights=labels - probabilities, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _gauc(labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray) -> float | None:
    _check_users(labels, users)
    order = np.argsort(users, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(users[order])) + 1)
    aucs = [_auc(labels[group], probabilities[group]) for group in groups]
    scored = [(auc, len(group)) for auc, group in zip(aucs, groups, strict=True) if auc is not None]
    return sum(auc * size for auc, size in scored) / sum(size for _, size in scored) if scored else None


def _is_one(users: np.ndarray | None) -> bool:
    return users is not None and len(np.unique(users)) < 2


def _check_users(labels: np.ndarray, users: np.ndarray) -> None:
    if users.shape != labels.shape:
        raise InputError(f"users: expected as many as labels, got shapes {users.shape} and {labels.shape}")


def _intervals(
    labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray | None, bootstrap: int, seed: int
) -> dict[str, Any]:
    # The same clipping as scikit-learn's log_loss.
    p = np.clip(probabilities, np.finfo(np.float64).eps, 1 - np.finfo(np.float64).eps)
    losses = -np.where(labels == 1, np.log(p), np.log1p(-p))
    hits = (labels == (probabilities >= 0.5)).astype(np.float64)
    draws: dict[str, list[np.ndarray]] = {"auc": [], "log_loss": [], "acc": []}
    for weights in _resamplings(labels, users, bootstrap, seed):
        drawn = weights.sum(axis=1)
        draws["auc"].append(_weighted_auc(labels, probabilities, weights))
        draws["log_loss"].append(weights @ losses / drawn)
        draws["acc"].append(weights @ hits / drawn)
    return {key: _percentiles(np.concatenate(parts)) for key, parts in draws.items()}


def _resamplings(
    labels: np.ndarray, users: np.ndarray | None, bootstrap: int, seed: int
) -> Iterator[np.ndarray]:
    """How often each sample is drawn, (rows, n) float64, `bootstrap` rows in all.

    As many users are drawn as there are, each with all samples; without users, samples.
    """
    of = np.arange(len(labels))
    if users is not None:
        _check_users(labels, np.asarray(users))
        of = np.unique(users, return_inverse=True)[1]
    n = int(of.max()) + 1
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(labels))
    for start in range(0, bootstrap, rows):
        drawn = rng.integers(0, n, size=(min(rows, bootstrap - start), n))
        drawn += np.arange(len(drawn))[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        yield times if users is None else times[:, of]


def _weighted_auc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC under each row of `weights` (rows, n): the share of (positive, negative) pairs in order, ties half.

    NaN for a row without weight on one of the classes.
    """
    order = np.argsort(probabilities, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(probabilities[order])) + 1])
    weights = weights[:, order]
    positives = np.add.reduceat(weights * (labels[order] == 1), starts, axis=1)
    negatives = np.add.reduceat(weights * (labels[order] == 0), starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    with np.errstate(invalid="ignore"):
        return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def _percentiles(values: np.ndarray) -> list[float] | None:
    values = values[np.isfinite(values)]
    return [float(bound) for bound in np.percentile(values, (2.5, 97.5))] if len(values) else None
