"""Metrics against sums over pairs, samples and bins, and bootstrap intervals against a plain loop."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rellax.ctr import metrics
from rellax.ctr.metrics import evaluate, paired_bootstrap
from rellax.errors import InputError

RNG = np.random.default_rng(0)
LABELS = (RNG.random(301) < 0.4).astype(np.int8)
# Two decimals: many ties.
PROBABILITIES = np.round(np.clip(0.25 * LABELS + 0.75 * RNG.random(301), 0, 1), 2)
USERS = RNG.integers(0, 23, 301)


def pairwise_auc(labels: np.ndarray, p: np.ndarray) -> float:
    positives, negatives = p[labels == 1][:, None], p[labels == 0]
    return float(np.mean((positives > negatives) + 0.5 * (positives == negatives)))


def mean_loss(labels: np.ndarray, p: np.ndarray) -> float:
    p = p.clip(1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(labels == 1, np.log(p), np.log(1 - p))))


def test_values_equal_their_definitions() -> None:
    result = evaluate(LABELS, PROBABILITIES, USERS, bootstrap=0)
    assert result["samples"] == 301
    assert result["positives"] == LABELS.sum()
    assert result["auc"] == pytest.approx(pairwise_auc(LABELS, PROBABILITIES), abs=1e-12)
    losses = [-math.log(p if y else 1 - p) for y, p in zip(LABELS, PROBABILITIES, strict=True)]
    assert result["log_loss"] == pytest.approx(sum(losses) / 301, abs=1e-12)
    assert result["acc"] == sum((p >= 0.5) == y for y, p in zip(LABELS, PROBABILITIES, strict=True)) / 301


def test_ece_is_the_weighted_gap_per_bin() -> None:
    expected = 0.0
    for low in range(10):
        inside = [(y, p) for y, p in zip(LABELS, PROBABILITIES, strict=True) if low == min(int(p * 10), 9)]
        if inside:
            expected += abs(sum(y for y, _ in inside) - sum(p for _, p in inside)) / 301
    assert evaluate(LABELS, PROBABILITIES, bootstrap=0)["ece"] == pytest.approx(expected, abs=1e-12)
    assert evaluate([0, 1], [0.0, 1.0], bootstrap=0)["ece"] == 0.0
    # One is in the last bin, beside 0.9.
    assert evaluate([1, 0], [0.9, 1.0], bootstrap=0)["ece"] == pytest.approx(0.45)


def test_gauc_weighs_users_with_both_classes() -> None:
    total, weight = 0.0, 0
    for user in set(USERS.tolist()):
        mine = np.equal(USERS, user)
        if 0 < LABELS[mine].sum() < mine.sum():
            total += mine.sum() * pairwise_auc(LABELS[mine], PROBABILITIES[mine])
            weight += mine.sum()
    assert evaluate(LABELS, PROBABILITIES, USERS, bootstrap=0)["gauc"] == pytest.approx(
        total / weight, abs=1e-12
    )
    assert evaluate([1, 0, 0], [0.9, 0.1, 0.5], [7, 8, 8], bootstrap=0)["gauc"] is None


@pytest.mark.parametrize("key", ["auc", "log_loss", "acc"])
def test_intervals_agree_with_a_plain_bootstrap(key: str) -> None:
    value = {"auc": pairwise_auc, "log_loss": mean_loss, "acc": lambda y, p: np.mean((p >= 0.5) == y)}[key]
    rng, draws = np.random.default_rng(7), []
    for _ in range(2000):
        rows = rng.integers(0, 301, 301)
        draws.append(value(LABELS[rows], PROBABILITIES[rows]))
    low, high = np.percentile(draws, [2.5, 97.5])
    result = evaluate(LABELS, PROBABILITIES, bootstrap=2000)
    assert result[f"{key}_interval"] == pytest.approx([low, high], abs=0.1 * (high - low))
    assert result[f"{key}_interval"][0] < result[key] < result[f"{key}_interval"][1]


def test_whole_users_are_drawn() -> None:
    """The same as drawing users in a loop, for one model and for the difference of two."""
    rng, draws = np.random.default_rng(7), []
    other = np.clip(PROBABILITIES + 0.4 * rng.normal(size=301), 0, 1)
    of = [np.flatnonzero(user == USERS) for user in np.unique(USERS)]
    for _ in range(2000):
        rows = np.concatenate([of[drawn] for drawn in rng.integers(0, len(of), len(of))])
        auc = pairwise_auc(LABELS[rows], PROBABILITIES[rows])
        loss = mean_loss(LABELS[rows], PROBABILITIES[rows])
        draws.append((auc, loss, auc - pairwise_auc(LABELS[rows], other[rows])))
    expected = np.percentile(draws, [2.5, 97.5], axis=0).T
    result = evaluate(LABELS, PROBABILITIES, USERS, bootstrap=2000)
    pair = paired_bootstrap(LABELS, PROBABILITIES, other, USERS, bootstrap=2000)
    found = (result["auc_interval"], result["log_loss_interval"], pair["interval"])
    for one, (low, high) in zip(found, expected, strict=True):
        assert one == pytest.approx([low, high], abs=0.1 * (high - low))
    # A sample that is there ten times tells no more than once.
    many = evaluate(*(np.repeat(values, 10) for values in (LABELS, PROBABILITIES, np.arange(301))))
    once = evaluate(LABELS, PROBABILITIES)
    assert many["auc_interval"] == pytest.approx(once["auc_interval"])
    with pytest.raises(InputError, match="users: expected as many as labels"):
        paired_bootstrap(LABELS, PROBABILITIES, other, USERS[:-1])


@pytest.mark.parametrize("users", [None, USERS], ids=["samples", "users"])
def test_how_many_resamplings_are_in_memory_changes_nothing(
    users: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven at once, of 52."""

    def results() -> list[dict[str, Any]]:
        pair = paired_bootstrap(LABELS, PROBABILITIES, PROBABILITIES[::-1], users, bootstrap=52)
        return [evaluate(LABELS, PROBABILITIES, users, bootstrap=52), pair]

    whole = results()
    monkeypatch.setattr(metrics, "_CHUNK", 7 * len(LABELS))
    for found, expected in zip(results(), whole, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-12), key


def test_a_probability_of_one_half_is_a_yes() -> None:
    """In the interval as well, which has no width: each user has one Yes in three."""
    result = evaluate(np.tile([1, 0, 0], 5), np.full(15, 0.5), np.repeat(np.arange(5), 3), bootstrap=20)
    assert result["acc"] == pytest.approx(1 / 3)
    assert result["acc_interval"] == pytest.approx([1 / 3, 1 / 3])


def test_one_user_says_nothing_of_others() -> None:
    """Drawn again and again it gives intervals of no width, and the smallest p there is."""
    users = np.zeros_like(USERS)
    result = evaluate(LABELS, PROBABILITIES, users)
    assert result["auc"] is not None
    assert result["auc_interval"] is result["log_loss_interval"] is result["acc_interval"] is None
    compared = paired_bootstrap(LABELS, PROBABILITIES, RNG.random(301), users)
    assert set(compared.values()) == {None}


def test_same_seed_same_intervals_and_json_ready() -> None:
    first = evaluate(LABELS, PROBABILITIES, USERS, bootstrap=50, seed=3)
    assert first == evaluate(LABELS, PROBABILITIES, USERS, bootstrap=50, seed=3)
    assert (
        first["auc_interval"] != evaluate(LABELS, PROBABILITIES, USERS, bootstrap=50, seed=4)["auc_interval"]
    )
    pair = LABELS, PROBABILITIES, PROBABILITIES[::-1], USERS
    one, again, other = (paired_bootstrap(*pair, bootstrap=50, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one["difference"] == other["difference"]
    assert one["interval"] != other["interval"]
    assert json.loads(json.dumps(first)) == first


def test_one_class_has_no_auc() -> None:
    result = evaluate(np.ones(5), np.linspace(0.1, 0.9, 5), np.arange(5), bootstrap=20)
    assert result["auc"] is None
    assert result["gauc"] is None
    assert result["auc_interval"] is None
    assert result["log_loss_interval"] is not None


def test_paired_bootstrap_shares_its_resamplings() -> None:
    same = paired_bootstrap(LABELS, PROBABILITIES, PROBABILITIES, bootstrap=100)
    assert same == {"difference": 0.0, "interval": [0.0, 0.0], "share_above_zero": 0.0, "p_value": 1.0}
    # Sure predictions barely changed: the difference is far steadier than either AUC.
    nearly = np.where(np.arange(301) % 50 == 0, 0.5, PROBABILITIES)
    result = paired_bootstrap(LABELS, PROBABILITIES, nearly, bootstrap=500)
    low, high = evaluate(LABELS, PROBABILITIES, bootstrap=500)["auc_interval"]
    assert result["interval"][1] - result["interval"][0] < 0.5 * (high - low)
    expected = roc_auc_score(LABELS, PROBABILITIES) - roc_auc_score(LABELS, nearly)
    assert result["difference"] == pytest.approx(expected, abs=1e-12)
    swapped = paired_bootstrap(LABELS, nearly, PROBABILITIES, bootstrap=500)
    assert swapped["interval"] == pytest.approx([-result["interval"][1], -result["interval"][0]])


def test_paired_bootstrap_of_several_runs() -> None:
    """The same as resampling in a loop and averaging the runs' AUCs in it."""
    rng = np.random.default_rng(5)
    runs = np.clip(PROBABILITIES + 0.15 * rng.normal(size=(3, 301)), 0, 1)
    other = np.clip(PROBABILITIES + 0.4 * rng.normal(size=(2, 301)), 0, 1)
    result = paired_bootstrap(LABELS, runs, other, bootstrap=2000)
    draws = []
    for _ in range(2000):
        rows = rng.integers(0, 301, 301)
        a, b = (np.mean([pairwise_auc(LABELS[rows], p[rows]) for p in many]) for many in (runs, other))
        draws.append(a - b)
    low, high = np.percentile(draws, [2.5, 97.5])
    assert result["interval"] == pytest.approx([low, high], abs=0.1 * (high - low))
    means = [np.mean([roc_auc_score(LABELS, p) for p in many]) for many in (runs, other)]
    assert result["difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
    assert result["p_value"] == pytest.approx(2 * np.mean(np.array(draws) <= 0), abs=0.01)
    assert paired_bootstrap(LABELS, other, runs, bootstrap=2000)["p_value"] == result["p_value"]
    sure = paired_bootstrap(LABELS, LABELS * 0.9, 1 - LABELS * 0.9, bootstrap=99)
    assert sure["p_value"] == pytest.approx(2 / 100)
    assert sure["share_above_zero"] == 1.0


def test_ties_count_half_in_each_resampling() -> None:
    """What calls all samples alike has an AUC of one half, whichever are drawn."""
    alike = np.full(301, 0.3)
    assert evaluate(LABELS, alike, USERS, bootstrap=50)["auc_interval"] == pytest.approx(
        [0.5, 0.5], abs=1e-12
    )
    interval = evaluate(LABELS, PROBABILITIES, USERS, bootstrap=50)["auc_interval"]
    compared = paired_bootstrap(LABELS, PROBABILITIES, alike, USERS, bootstrap=50)
    assert compared["interval"] == pytest.approx([bound - 0.5 for bound in interval], abs=1e-12)


def test_sure_and_wrong_is_a_large_loss_and_no_infinite_one() -> None:
    """fp32 rounds to 0 and 1."""
    sure = np.where(np.arange(301) % 10 == 0, 1 - LABELS, LABELS).astype(np.float64)
    result = evaluate(LABELS, sure, bootstrap=200)
    eps = np.finfo(np.float64).eps
    assert (
        result["log_loss_interval"]
        == evaluate(LABELS, sure.clip(eps, 1 - eps), bootstrap=200)["log_loss_interval"]
    )
    low, high = result["log_loss_interval"]
    assert low < result["log_loss"] < high < math.inf


def test_resamplings_of_one_class_are_left_out() -> None:
    """A third of them draw no Yes; what is left has an AUC, and counts for the p value."""
    labels, right = np.array([1, 0, 0, 0, 0]), np.array([0.9, 0.1, 0.2, 0.3, 0.4])
    assert evaluate(labels, right, bootstrap=100)["auc_interval"] == [1.0, 1.0]
    result = paired_bootstrap(labels, right, 1 - right, bootstrap=100)
    assert (result["interval"], result["share_above_zero"]) == ([1.0, 1.0], 1.0)
    assert 2 / 101 < result["p_value"] < 2 / 40
    nothing = paired_bootstrap(np.zeros(5), right, 1 - right, bootstrap=100)
    assert set(nothing.values()) == {None}


@pytest.mark.parametrize(
    ("labels", "probabilities", "words"),
    [
        ([0, 1], [0.5], r"as many as labels.*\(1,\).*\(2,\)"),
        ([], [], "at least one"),
        ([0, 2], [0.5, 0.5], "0 and 1, got 2"),
        ([0, 1], [0.5, 1.5], r"\[0, 1\], got 1.5 at 1"),
        ([0, 1], [float("nan"), 0.5], "got nan at 0"),
    ],
    ids=["length", "empty", "label", "range", "nan"],
)
def test_bad_input(labels: list[int], probabilities: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate(labels, probabilities)


def test_users_of_another_length() -> None:
    with pytest.raises(InputError, match="users: expected as many"):
        evaluate([0, 1], [0.5, 0.5], [1, 2, 3])
