"""What retrieval puts before the model, beside what the most recent behaviours would be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from rellax import subr
from rellax._files import read_json
from rellax.ctr.dataset import Dataset
from rellax.ctr.prompts import Wording, recent
from rellax.ctr.report.material import Material, Run
from rellax.errors import InputError

_SUMMARY = 1000  # samples that the summary is over
_DEFAULT_K = 5


@dataclass(frozen=True)
class Behaviour:
    """One line: what the user said of an item, how like the target it is, and whether both sides show it."""

    title: str
    said: str
    similarity: float
    age: int
    on_both: bool


@dataclass(frozen=True)
class Shown:
    """One sample with its behaviours, the most important first."""

    sample: int
    target: str
    profile: str
    history: int
    said: str
    label: int
    recent: list[Behaviour]
    retrieved: list[Behaviour]


@dataclass(frozen=True)
class Summary:
    """Means over `samples` samples whose history is longer than k."""

    samples: int
    k: int
    similarity_retrieved: float
    similarity_recent: float
    new: float  # share of the retrieved behaviours that are not among the most recent ones
    age_retrieved: float  # behaviours of the user that came after it


class Retrieval:
    """Looks behaviours up in the folders that runs were made with.

    Raises:
        InputError: a folder is missing, or was made from other items.
    """

    def __init__(self, material: Material) -> None:
        trained = [run.config for run in material.runs if run.config.get("retrieved")]
        recorded = trained[0]["retrieved"] if trained else None
        folder = material.folder(recorded, "retrieved")
        if folder is None:
            raise InputError(f"{material.work / 'retrieved'}: expected what `rellax retrieve` found")
        config = read_json(folder / "config.json", maker="rellax retrieve")
        embeddings = material.folder(config["embeddings"], "embeddings")
        if embeddings is None:
            raise InputError(f"{config['embeddings']}: expected the embeddings of `rellax embed`")
        self.data: Dataset = material.dataset
        self.folder: Path = folder
        self.k: int = min(trained[0]["k"] if trained else _DEFAULT_K, config["k"])
        self.wording = Wording.of(self.data.meta)
        self.embeddings: Tensor = subr.load_embeddings(embeddings, self.data.items["item_id"].to_pylist())

    def summary(self, samples: np.ndarray, seed: int) -> Summary | None:
        """Over random ones of `samples`; None where no history is longer than k."""
        long = samples[self.data.samples.position[samples] > self.k]
        if not len(long):
            return None
        long = np.sort(np.random.default_rng(seed).permutation(long)[:_SUMMARY])
        found, last = self._positions(long)
        new = ~(found[:, :, None] == last[:, None, :]).any(2)
        return Summary(
            samples=len(long),
            k=self.k,
            similarity_retrieved=float(self._similarities(long, found).mean()),
            similarity_recent=float(self._similarities(long, last).mean()),
            new=float(new.mean()),
            age_retrieved=float((self.data.samples.position[long][:, None] - 1 - found).mean()),
        )

    def show(self, sample: int) -> Shown:
        data, one = self.data, np.array([sample])
        found, last = self._positions(one)
        history, item = data.history(sample), int(data.samples.item[sample])
        sides = [
            self._behaviours(sample, side[0], other[0]) for side, other in ((last, found), (found, last))
        ]
        return Shown(
            sample=sample,
            target=data.texts[item],
            profile=data.profiles[data.samples.user[sample]],
            history=history.stop - history.start,
            said=self._said(history.stop),
            label=int(data.samples.label[sample]),
            recent=sides[0],
            retrieved=sides[1],
        )

    def _positions(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, k) positions of the retrieved and of the most recent behaviours, then -1."""
        every, data = self.data.samples, self.data
        user, position, item = every.user[samples], every.position[samples], every.item[samples]
        found = subr.retrieve(
            self.embeddings, data.behaviour_items, data.offsets, user, position, item, self.k
        )[0]
        return found, recent(position, self.k)

    def _similarities(self, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Cosine of each behaviour with its sample's target, the shape of `positions`."""
        data = self.data
        rows = data.offsets[data.samples.user[samples]][:, None] + positions
        items = self.embeddings[data.behaviour_items[rows].astype(np.int64)].float()
        targets = self.embeddings[data.samples.item[samples].astype(np.int64)].float()
        return (items * targets[:, None]).sum(-1).numpy()

    def _behaviours(self, sample: int, positions: np.ndarray, others: np.ndarray) -> list[Behaviour]:
        positions = positions[positions >= 0]
        history = self.data.history(sample)
        similarities = self._similarities(np.array([sample]), positions[None])[0]
        return [
            Behaviour(
                title=self.data.titles[self.data.behaviour_items[history.start + position]],
                said=self._said(history.start + position),
                similarity=float(similarity),
                age=history.stop - history.start - int(position),
                on_both=bool((others == position).any()),
            )
            for position, similarity in zip(positions, similarities, strict=True)
        ]

    def _said(self, row: int) -> str:
        return self.wording.said(float(self.data.behaviour_ratings[row]))


def pick(material: Material, run: Run | None, count: int) -> list[int]:
    """Random samples, of which the run got some right and some wrong where there are such."""
    rng = np.random.default_rng(material.seed)
    if run is None or run.scores is None:
        samples = rng.permutation(material.dataset.indices(material.split))
        return [int(sample) for sample in samples[:count]]
    scores = run.scores
    order = rng.permutation(len(scores.sample))
    right = (scores.probability >= 0.5) == (scores.label == 1)
    sides = [[row for row in order if right[row] == side] for side in (True, False)]
    half = max(1, count // 2)
    wrong = sides[1][: max(half, count - len(sides[0]))]
    rows = sides[0][: count - len(wrong)] + wrong
    return [int(scores.sample[row]) for row in rows]
