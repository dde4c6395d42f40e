"""The targets of a study, each with its verdict and the numbers that decide it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rellax.ctr.methods import METHODS, Method
from rellax.ctr.study.results import Result, Results, signed

_FEW_SHOTS = 8192
_LEVEL = 0.05


def verdicts(results: Results) -> list[tuple[str, str, str]]:
    """Each target, "met", "level" (neither surely), "missed" or "not run", and what decides it."""
    return [(title, *decide(results)) for title, decide in _TARGETS.items()]


def _subr_beats_recent(pair: tuple[str, str]) -> Callable[[Results], tuple[str, str]]:
    """At each number of shots and each K of 10 and more where both have run."""

    def decide(results: Results) -> tuple[str, str]:
        is_trained, better, details = METHODS[pair[0]].stage is not None, [], []
        for shots in results.shots if is_trained else (0,):
            compared = []
            for k in results.ks:
                a, b = (results.get(method, k, shots) for method in pair)
                if k >= 10 and a is not None and b is not None:
                    better.append(a.auc > b.auc)
                    compared.append(f"K = {k}: {a.auc:.3f} against {b.auc:.3f}")
            if compared:
                details.append(f"{shots:,} shots, " * is_trained + "; ".join(compared))
        verdict = ("met" if all(better) else "missed") if better else "not run"
        return verdict, ". ".join(details) or "-"

    return decide


def _no_fall(results: Results) -> tuple[str, str]:
    """Of the best method that has run at several K, with the most shots."""
    for method in ("rellax", "rella", "lora-retrieved", "zero-shot-retrieved"):
        for shots in results.shots[::-1] or [0]:
            curve = results.curve(method, shots)
            if len(curve) > 1:
                return _falls(results, METHODS[method], shots, curve)
    return "not run", "-"


def _falls(
    results: Results, method: Method, shots: int, curve: Sequence[tuple[int, Result]]
) -> tuple[str, str]:
    (best_k, best), (_, last) = max(curve[:-1], key=lambda one: one[1].auc), curve[-1]
    result = results.compare(last, best)
    values = ", ".join(f"{k}: {r.auc:.3f}" for k, r in curve)
    return (
        "met" if last.auc >= best.auc else _fallen(result),
        f"{method.title}{f', {shots:,} shots' if method.stage else ''}: {values}; last less K = {best_k} "
        f"{signed(result)}",
    )


def _beats(a: str, b: str) -> Callable[[Results], tuple[str, str]]:
    def decide(results: Results) -> tuple[str, str]:
        shots = max(results.shots, default=0)
        k = results.chosen_k(shots)
        first, second = results.get(a, k, shots), results.get(b, k, shots)
        if first is None or second is None:
            return "not run", "-"
        result = results.compare(first, second)
        return _verdict(result), f"K = {k}, {shots:,} shots: {signed(result)}"

    return decide


def _verdict(result: dict[str, Any]) -> str:
    """Of a target that asks for more than chance."""
    better = result["difference"] is not None and result["difference"] > 0 and result["p_value"] < _LEVEL
    return "met" if better else "missed"


def _fallen(result: dict[str, Any]) -> str:
    """Of a difference that is not to be negative: "missed" where it surely is."""
    return "missed" if result["interval"] is not None and result["interval"][1] < 0 else "level"


def _stacked_beats_classical(results: Results, ours: Result, best: Result) -> tuple[str, str]:
    both, alone = results.stacked(ours, best)
    if not len(both):
        return "not run", ""
    result = results.compare_probabilities(both, alone)
    return _verdict(result), f", {best.method}: {signed(result)}"


def _beats_classical(results: Results, ours: Result, best: Result) -> tuple[str, str]:
    result = results.compare(ours, best)
    verdict = "met" if _verdict(result) == "met" else _fallen(result)
    return verdict, f": {ours.auc:.3f} against {best.method} {best.auc:.3f}, {signed(result)}"


def _against_best(
    method: str, decide: Callable[[Results, Result, Result], tuple[str, str]]
) -> Callable[[Results], tuple[str, str]]:
    """With the largest number of shots that is still few, beside the best classical model on all samples.

    Args:
        decide: the verdict, and what follows K and shots.
    """

    def decided(results: Results) -> tuple[str, str]:
        shots = max((n for n in results.shots if n <= _FEW_SHOTS), default=0)
        k = results.chosen_k(shots)
        ours, best = results.get(method, k, shots), results.best_classical(None)
        if ours is None or best is None:
            return "not run", "-"
        verdict, detail = decide(results, ours, best)
        return verdict, f"K = {k}, {shots:,} shots{detail}" if detail else "-"

    return decided


_TARGETS: dict[str, Callable[[Results], tuple[str, str]]] = {
    "SUBR above recent at every K ≥ 10, zero-shot": _subr_beats_recent(
        ("zero-shot-retrieved", "zero-shot-recent")
    ),
    "SUBR above recent at every K ≥ 10, trained": _subr_beats_recent(("lora-retrieved", "lora-recent")),
    "no fall of AUC as K grows": _no_fall,
    "ReLLaX above ReLLa, p < 0.05": _beats("rellax", "rella"),
    "ReLLa above LoRA on recent prompts, p < 0.05": _beats("rella", "lora-recent"),
    "ReLLaX with at most 8,192 shots above the best classical model on all samples": _against_best(
        "rellax", _beats_classical
    ),
    "the same, boosted from the classical model": _against_best("rellax-boosted", _beats_classical),
    "the same, boosted and stacked on that model, p < 0.05": _against_best(
        "rellax-boosted", _stacked_beats_classical
    ),
}
