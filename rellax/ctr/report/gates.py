"""What a run's gates do: how far they are from plain LoRA, and for whom they differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rellax.ctr import crm
from rellax.ctr.report.material import Material, Run
from rellax.errors import InputError
from rellax.ops import gate_bank
from rellax.patch import peft_files
from rellax.patch.adapter import TENSOR_FILE
from rellax.patch.rules import PROJECTIONS

SAMPLES = 500  # whose gates are looked at
_PERMUTATIONS = 200
_VALUES = 6  # of a user field that are told apart
_BANK = "rellax.gate_bank."


@dataclass(frozen=True)
class Segments:
    """A way to tell samples apart: `code` (n,) indexes `names`, which may be in an order."""

    title: str
    names: tuple[str, ...]
    code: np.ndarray
    ordered: bool = False


@dataclass(frozen=True)
class Gates:
    """Gates of n samples and M projections.

    Attributes:
        projections: (layer, kind) of each.
        mean: (M, r, r), the mean gate minus the identity.
        shared: (M,), its Frobenius norm in units of the identity's.
        personal: (M,), root mean square distance of the samples' gates from their mean, in the same unit.
        distance: (n,), of each sample's gates from the identity, over all projections, in the same unit.
        components: (n, up to n) principal components of the samples' gates, the largest first.
        explained: share of variance of each component.
    """

    projections: list[tuple[int, str]]
    mean: np.ndarray
    shared: np.ndarray
    personal: np.ndarray
    distance: np.ndarray
    components: np.ndarray
    explained: np.ndarray

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for _, kind in self.projections))

    def of_kind(self, kind: str) -> tuple[list[int], list[int]]:
        """Indices of the projections of a kind, and their layers."""
        rows = [row for row, (_, other) in enumerate(self.projections) if other == kind]
        return rows, [self.projections[row][0] for row in rows]


def chosen(material: Material, run: Run) -> np.ndarray:
    """Random ones of the samples that the run scored, or of the split where it scored none."""
    samples = material.dataset.indices(material.split) if run.scores is None else run.scores.sample
    return np.sort(np.random.default_rng(material.seed).permutation(samples)[:SAMPLES])


def gates(material: Material, run: Run, samples: np.ndarray) -> Gates:
    """The gates of a trained run for these samples.

    Raises:
        InputError: the adapter or the classical model's folder is missing or damaged.
    """
    tensors = peft_files.read_tensors(run.folder / "adapter" / TENSOR_FILE)
    folder = material.folder(run.config.get("crm"), "crm")
    if folder is None:
        raise InputError(f"{run.config.get('crm')}: expected the folder of `rellax crm`, found none")
    u = crm.load_crm(folder, material.dataset).instance_embeddings[samples]
    bank = {name.removeprefix(_BANK): t.float() for name, t in tensors.items() if name.startswith(_BANK)}
    names = ("ln_weight", "ln_bias", "w1", "b1", "w2", "b2")
    if missing := [name for name in names if name not in bank]:
        raise InputError(f"{run.folder / 'adapter'}: expected gates, found no tensor {_BANK}{missing[0]}")
    values = gate_bank(u, *(bank[name] for name in names))
    rank = values.shape[-1]
    deviation = (values - torch.eye(rank)).flatten(2)  # (M, n, r²)
    mean = deviation.mean(1)
    spread = deviation - mean[:, None]
    unit = rank**0.5
    components, explained = _principal_components(spread.transpose(0, 1).flatten(1))
    return Gates(
        projections=_projections(tensors),
        mean=mean.unflatten(1, (rank, rank)).numpy(),
        shared=(mean.norm(dim=1) / unit).numpy(),
        personal=(spread.square().sum(2).mean(1).sqrt() / unit).numpy(),
        distance=(deviation.square().sum(2).mean(0).sqrt() / unit).numpy(),
        components=components.numpy(),
        explained=explained.numpy(),
    )


def segments(material: Material, samples: np.ndarray, prediction: np.ndarray | None) -> list[Segments]:
    """By activity, by every field that is known of users, by what was answered and what was predicted."""
    data = material.dataset
    found = [_quarters("earlier behaviours", data.samples.position[samples])]
    users = data.samples.user[samples]
    for field in data.meta["features"]["user"]:
        values = np.array([str(value) for value in data.users[field].to_pylist()])[users]
        found.append(_by_value(field.replace("_", " "), values))
    found.append(_by_value("answer", np.where(data.samples.label[samples] == 1, "Yes", "No")))
    if prediction is not None:
        found.append(_quarters("predicted probability", prediction, digits=2))
    return [one for one in found if len(one.names) > 1]


def explained_by(found: Gates, by: Segments, seed: int) -> tuple[float, float]:
    """The share of the gates' variance that lies between segments, and the 95th percentile of it by chance.

    Chance is the same segments dealt out at random.
    """
    rng = np.random.default_rng(seed)
    total = np.square(found.components).sum()
    if total <= 0:
        return 0.0, 0.0
    one_hot = np.eye(len(by.names))[by.code]
    by_chance = [_between(found, one_hot[rng.permutation(len(one_hot))]) for _ in range(_PERMUTATIONS)]
    return float(_between(found, one_hot) / total), float(np.percentile(by_chance, 95) / total)


def _between(found: Gates, one_hot: np.ndarray) -> float:
    sums = one_hot.T @ found.components
    return float((np.square(sums).sum(1) / one_hot.sum(0)).sum())


def _projections(tensors: dict[str, Tensor]) -> list[tuple[int, str]]:
    """Layer and kind of each projection in the gate bank's order: by layer, then as in the rules' table."""
    order = [path.rsplit(".", 1)[-1] for path in PROJECTIONS]
    found = []
    for name in tensors:
        if name.endswith(".lora_a"):
            *_, layer, _block, kind, _ = name.split(".")
            found.append((int(layer), kind))
    return sorted(found, key=lambda one: (one[0], order.index(one[1])))


def _principal_components(spread: Tensor) -> tuple[Tensor, Tensor]:
    """Of centred rows (n, values), by the products of all pairs, as there are more values than rows."""
    values, vectors = torch.linalg.eigh((spread @ spread.T).double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = values.sum()
    return vectors * values.sqrt(), values / total if total > 0 else values


def _quarters(title: str, values: np.ndarray, *, digits: int = 0) -> Segments:
    edges = np.unique(np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf"))
    code = np.searchsorted(edges, values, side="left")
    kept, code = np.unique(code, return_inverse=True)
    names = []
    for index in range(len(kept)):
        part = values[code == index]
        names.append(f"{part.min():.{digits}f} to {part.max():.{digits}f}")
    return Segments(title, tuple(names), code, ordered=True)


def _by_value(title: str, values: np.ndarray) -> Segments:
    """The most frequent values, and all others as one."""
    names, counts = np.unique(values, return_counts=True)
    if len(names) > _VALUES:
        names = np.sort(names[np.argsort(-counts, kind="stable")[: _VALUES - 1]])
    code = np.searchsorted(names, values).clip(max=len(names) - 1)
    others = names[code] != values
    if not others.any():
        return Segments(title, tuple(names.tolist()), code)
    return Segments(title, (*names.tolist(), "all others"), np.where(others, len(names), code))
