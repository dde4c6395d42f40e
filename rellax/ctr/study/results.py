"""What the runs of a study found: read from their folders, and put together over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax._files import read_json
from rellax.ctr import metrics
from rellax.ctr.calibration import fit_stacking
from rellax.ctr.methods import METHODS, is_language_model
from rellax.ctr.predictions import Predictions

if TYPE_CHECKING:
    from rellax.ctr.study.grid import Cell

METRICS = {"auc": "AUC", "log_loss": "LogLoss", "acc": "ACC", "gauc": "GAUC", "ece": "ECE"}
# Earlier behaviours of a user: the lower bound of each bin.
HISTORY_BINS = {"under 20": 0, "20 to 49": 20, "50 to 99": 50, "100 to 199": 100, "200 and more": 200}


@dataclass(frozen=True)
class Scored:
    """The test samples of all runs: rows, labels, users and numbers of earlier behaviours, each (n,)."""

    rows: np.ndarray
    labels: np.ndarray
    users: np.ndarray
    histories: np.ndarray


@dataclass(frozen=True)
class Finished:
    """A run.

    Attributes:
        probabilities: (n,), of the test samples.
        validation: AUC on the validation samples; None for an untrained model.
        metrics: of the test samples, as `metrics.evaluate` gives them.
        known: of the validation samples, by a language model; of all samples, where there is none; None for
            an untrained model.
    """

    cell: Cell
    probabilities: np.ndarray
    validation: float | None
    metrics: dict[str, Any]
    known: Predictions | None = None

    @classmethod
    def read(cls, out: Path, cell: Cell, test: Scored) -> Finished:
        found = Predictions.read((out / cell.result).parent)
        known: Predictions | None = None
        validation: float | None = None
        if not is_language_model(cell.method):
            known = found
            validation = read_json(out / cell.name / "metrics.json")["valid"]["auc"]
        elif METHODS[cell.method].stage is not None:
            known = Predictions.read(out / cell.name)
            validation = read_json(out / cell.name / "metrics.json")["validation"]["auc"]
        return cls.of(cell, found.at(test.rows).probabilities, validation, test, known)

    @classmethod
    def of(
        cls,
        cell: Cell,
        probabilities: np.ndarray,
        validation: float | None,
        test: Scored,
        known: Predictions | None = None,
    ) -> Finished:
        values = metrics.evaluate(test.labels, probabilities, test.users, bootstrap=0)
        return cls(cell, probabilities, validation, values, known)


def stacked(run: Finished, base: Finished, samples: np.ndarray) -> np.ndarray:
    """P(Yes) of the test samples by what both runs say, as `rellax calibrate --crm` has it.

    Args:
        samples: the validation samples that it is fitted on.
    """
    assert run.known is not None, "a trained run has predicted validation samples, "
    assert base.known is not None, "and a classical model all"
    one, other = run.known.at(samples), base.known.at(samples)
    fitted = fit_stacking(other.labels, one.probabilities, other.probabilities, base.cell.name)
    return fitted.apply(run.probabilities, base.probabilities)


@dataclass(frozen=True)
class Result:
    """One method at one K and number of shots: all its seeds.

    Attributes:
        probabilities: (seeds, n).
        metrics: mean and standard deviation over the seeds.
        validation: mean AUC on the validation samples; None for an untrained model.
    """

    method: str
    k: int | None
    shots: int | None
    probabilities: np.ndarray
    metrics: dict[str, tuple[float, float] | None]
    validation: float | None

    @property
    def title(self) -> str:
        if self.method in METHODS:
            return METHODS[self.method].title
        return f"{self.method}, {'all training samples' if self.shots is None else 'same shots'}"

    def show(self, name: str) -> str:
        value = self.metrics[name]
        if value is None:
            return "-"
        return f"{value[0]:.3f}" + (f" ± {value[1]:.3f}" if len(self.probabilities) > 1 else "")

    @property
    def auc(self) -> float:
        value = self.metrics["auc"]
        return float("nan") if value is None else value[0]


def signed(result: dict[str, Any]) -> str:
    """A difference as `metrics.paired_bootstrap` gives it: "+0.013 [-0.006, +0.031], p = 0.146"."""
    if result["difference"] is None:
        return "-"
    low, high = result["interval"]
    return f"{result['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p = {result['p_value']:.3f}"


class Results:
    """All results of a study, found by method, K and shots.

    Args:
        valid: the validation samples of a seed.
    """

    def __init__(
        self, finished: Sequence[Finished], test: Scored, valid: Callable[[int], np.ndarray]
    ) -> None:
        self.test = test
        self._valid = valid
        self._runs: dict[tuple[str, int | None, int | None], list[Finished]] = {}
        for run in finished:
            self._runs.setdefault((run.cell.method, run.cell.k, run.cell.shots), []).append(run)
        self.all = {key: self._result(key, runs) for key, runs in self._runs.items()}

    def get(self, method: str, k: int | None, shots: int | None) -> Result | None:
        """An untrained model has no shots, and is found for any number of them; a classical one has no K."""
        if method not in METHODS:
            k = None
        elif METHODS[method].stage is None:
            shots = 0
        return self.all.get((method, k, shots))

    @property
    def ks(self) -> list[int]:
        """The values of K that a method has, rising."""
        return sorted({k for _, k, _ in self.all if k is not None})

    @property
    def shots(self) -> list[int]:
        """The numbers of shots that a trained method has, rising."""
        return sorted({shots for method, _, shots in self.all if method in METHODS and shots})

    def curve(self, method: str, shots: int) -> list[tuple[int, Result]]:
        """A method's results by K."""
        found = [(k, self.get(method, k, shots)) for k in self.ks]
        return [(k, result) for k, result in found if result is not None]

    def chosen_k(self, shots: int) -> int:
        """The K at which the last trained method did best on the validation samples; else the middle one.

        0 where no method has run.
        """
        for method in reversed(METHODS):
            scored = {k: r.validation for k, r in self.curve(method, shots) if r.validation is not None}
            if scored:
                return max(scored, key=lambda k: scored[k])
        return self.ks[len(self.ks) // 2] if self.ks else 0

    def rows(self, k: int, shots: int) -> list[Result]:
        """All methods at one K and number of shots; classical models on these shots, and on all samples."""
        found = [self.get(method, k, shots) for method in METHODS]
        classical = dict.fromkeys(key[0] for key in self.all if key[0] not in METHODS)
        found += [self.get(name, None, n) for n in (shots, None) for name in classical]
        return [result for result in found if result is not None]

    def trained(self) -> list[tuple[str, str]]:
        """Title and name of what shots mean something to, classical models included."""
        names = dict.fromkeys(key[0] for key in self.all if key[2])
        return [(METHODS[name].title if name in METHODS else name, name) for name in names]

    def best_classical(self, shots: int | None) -> Result | None:
        """The classical model on so many samples with the highest AUC on the validation samples."""
        found = [r for (method, _, n), r in self.all.items() if method not in METHODS and n == shots]
        return max(found, key=lambda result: result.validation or 0.0, default=None)

    def compare(self, a: Result, b: Result) -> dict[str, Any]:
        return self.compare_probabilities(a.probabilities, b.probabilities)

    def compare_probabilities(self, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
        """The paired bootstrap of the test samples' probabilities (seeds, n); whole users are drawn."""
        return metrics.paired_bootstrap(self.test.labels, a, b, self.test.users)

    def stacked(self, result: Result, base: Result) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities (seeds, n) of a result stacked on another, and the other's: of seeds both have.

        What has no seed is stacked on each.
        """
        pairs = [
            (run, other)
            for other in self._runs[base.method, base.k, base.shots]
            for run in self._runs[result.method, result.k, result.shots]
            if run.cell.seed in (None, other.cell.seed) and run.known is not None
        ]
        both = [stacked(run, other, self._valid(other.cell.seed or 0)) for run, other in pairs]
        return np.array(both), np.array([other.probabilities for _, other in pairs])

    def by_history(self, result: Result) -> list[tuple[int, float | None]]:
        """Number of samples and mean AUC in each bin of history lengths."""
        bins = np.searchsorted(list(HISTORY_BINS.values()), self.test.histories, side="right") - 1
        found: list[tuple[int, float | None]] = []
        for number in range(len(HISTORY_BINS)):
            rows = bins == number
            labels = self.test.labels[rows]
            aucs = [
                metrics.evaluate(labels, p[rows], bootstrap=0)["auc"]
                for p in result.probabilities
                if len(labels)
            ]
            known = [auc for auc in aucs if auc is not None]
            found.append((int(rows.sum()), float(np.mean(known)) if known else None))
        return found

    def _result(self, key: tuple[str, int | None, int | None], runs: list[Finished]) -> Result:
        spread: dict[str, tuple[float, float] | None] = {}
        for name in METRICS:
            values = [run.metrics[name] for run in runs]
            spread[name] = None
            if None not in values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                spread[name] = (float(np.mean(values)), deviation)
        scores = [run.validation for run in runs if run.validation is not None]
        validation = float(np.mean(scores)) if scores else None
        return Result(*key, np.stack([run.probabilities for run in runs]), spread, validation)
