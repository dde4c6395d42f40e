"""The conventional recommendation model (CRM): a FuxiCTR model, trained here, and what it hands out.

Only the models are FuxiCTR's. Its data pipeline wants data sets of its own on disk, and its training loop
wants that pipeline; a short loop over tensors replaces both.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from rellax._files import atomic_folder, read_json, sha256_file, write_json
from rellax.ctr.config import CRMConfig
from rellax.ctr.dataset import Dataset
from rellax.ctr.llm import resolve_device
from rellax.ctr.metrics import evaluate
from rellax.ctr.predictions import Predictions
from rellax.ctr.runs import has_inputs, is_claimed, locked, plot_curves, write_record
from rellax.ctr.tensor_file import write_tensors
from rellax.ctr.vocabulary import Vocabulary
from rellax.errors import InputError, one_line

if TYPE_CHECKING:
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.models import BaseModel

logger = logging.getLogger(__name__)

OUTPUTS = "outputs.safetensors"
WEIGHTS = "model.safetensors"
VOCABULARY = "vocabulary.json"
_EVALUATIONS = 2  # on the validation split, per epoch
_PREDICT_BATCH = 2048
_MEASURED = 1 << 17  # training samples that tell the scale of the last hidden layer
_SPREAD = 2.0  # of an instance embedding's components, which its own length then hardly changes


@dataclass(frozen=True)
class CRMOutputs:
    """What a trained CRM knows of N items and S samples, all float32.

    Attributes:
        item_embeddings: (N, E), the embeddings of an item's id and features side by side.
        instance_embeddings: (S, d_u), the last hidden layer before the logit, scaled to a root mean square of
            1 over the training samples, then a constant and its negative. Gates begin with a layer norm; it
            would take away the layer's length, and with it much of what the model thinks of a sample, but
            beside two large constants the length stays. The table may be large: what `load_crm` returns is
            mapped, and its rows are read when they are used.
        probabilities: (S,), of label 1.
    """

    item_embeddings: Tensor
    instance_embeddings: Tensor
    probabilities: Tensor


def make_crm(
    data: str | Path, folder: str | Path, config: CRMConfig, *, device: str = "auto", redo: bool = False
) -> None:
    """Train a CRM on a data folder as `train_crm` does, if not done yet; anew where the data have changed.

    Raises:
        InputError: as `train_crm`, or `folder` holds something else, or another process works there.
    """
    claimed = is_claimed(folder, asdict(config), command="crm", redo=redo)
    dataset = Dataset.load(data)
    if claimed:
        if has_inputs(folder, _hashes(dataset)):
            return
        logger.info("crm: %s is of other data, or of an earlier version, and is trained anew", folder)
    with locked(folder):
        train_crm(dataset, folder, config, device=str(resolve_device(device)))


def train_crm(
    dataset: Dataset, folder: str | Path, config: CRMConfig | None = None, *, device: str = "cpu"
) -> dict[str, Any]:
    """Train a CRM and write what it knows of all items and samples to `folder`.

    The folder gets outputs.safetensors (see `CRMOutputs`), model.safetensors, vocabulary.json (what codes of
    features stand for), predictions.parquet (sample, label, probability; all samples), metrics.json,
    config.json, inputs.json, environment.json and curves.png.

    Returns:
        Contents of metrics.json: `evaluate` for `valid` and `test`, `best_step`, and `valid_auc` by step.

    Raises:
        InputError: more shots than training samples, or a validation split of one class.
    """
    config = config or CRMConfig()
    where, inputs = torch.device(device), _hashes(dataset)
    vocabulary = Vocabulary.of(dataset, user_id=config.user_id)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(config.seed)
        features = _Features(dataset, vocabulary, config, where).of(dataset)
        model = _build(features, config, where)
        log = _fit(model, features, dataset, config)
        _measure_hidden(model, features, dataset.indices("train"))
    every = np.arange(len(dataset.samples))
    items, probabilities = features.item_embeddings(model), np.empty(len(every), np.float32)
    shapes = {
        "item_embeddings": tuple(items.shape),
        "instance_embeddings": (len(every), _logit(model).in_features + 2),
        "probabilities": (len(every),),
    }

    def hidden() -> Iterator[np.ndarray]:
        row = 0
        with tqdm(total=len(every), desc=f"{config.model} of all samples", unit="sample") as bar:
            for block, predicted in _outputs(model, features, every):
                probabilities[row : row + len(block)] = predicted
                row += len(block)
                bar.update(len(block))
                yield _instance_embeddings(model, block).numpy()

    with atomic_folder(folder) as part:
        blocks = {
            "item_embeddings": [items.numpy()],
            "instance_embeddings": hidden(),
            "probabilities": [probabilities],
        }
        write_tensors(part / OUTPUTS, shapes, blocks)
        save_file(model.state_dict(), part / WEIGHTS)
        vocabulary.write(part / VOCABULARY)
        Predictions(every, dataset.samples.label, probabilities).write(part)
        metrics = {split: _metrics(dataset, probabilities, split) for split in ("valid", "test")} | log
        write_json(part / "metrics.json", metrics)
        write_record(part, asdict(config), inputs)
        steps, aucs = zip(*log["valid_auc"], strict=True)
        plot_curves(part / "curves.png", [("validation AUC", steps, aucs)])
    return metrics


def _metrics(dataset: Dataset, probabilities: np.ndarray, split: str) -> dict[str, Any]:
    rows, samples = dataset.indices(split), dataset.samples
    return evaluate(samples.label[rows], probabilities[rows], samples.user[rows])


def _hashes(dataset: Dataset) -> dict[str, str]:
    """SHA-256 of what a CRM is made from. Titles, texts and profiles may change."""
    paths = [dataset.folder / f"{name}.parquet" for name in ("behaviours", "samples")]
    hashes = {path.name: sha256_file(path) for path in paths}
    for kind, table in {"item": dataset.items, "user": dataset.users}.items():
        digest = hashlib.sha256()
        for name in (f"{kind}_id", *dataset.meta["features"][kind]):
            digest.update(json.dumps([name, table[name].to_pylist()]).encode())
        hashes[f"{kind}s"] = digest.hexdigest()
    return hashes


def crm_file(folder: str | Path, name: str) -> Path:
    """The path of a file that `rellax crm` wrote; an InputError where it is not there."""
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path}: expected a file of `rellax crm`, found none")
    return path


def load_crm(folder: str | Path, dataset: Dataset) -> CRMOutputs:
    """Read what `train_crm` wrote.

    Raises:
        InputError: the file is missing or damaged, or was made from other data than are there now.
    """
    path = crm_file(folder, OUTPUTS)
    if (Path(folder) / "inputs.json").exists() and not has_inputs(folder, _hashes(dataset)):
        raise InputError(
            f"{folder}: expected a CRM of the data in {dataset.folder}, found one of other data; "
            f"`rellax crm {Path(folder).name}`, with the options that it had, brings it up to date"
        )
    try:
        outputs = CRMOutputs(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise InputError(
            f"{path}: expected the outputs of `rellax crm`, but it is damaged ({error})"
        ) from None
    found = len(outputs.item_embeddings), len(outputs.instance_embeddings)
    expected = dataset.items.num_rows, len(dataset.samples)
    if found != expected:
        raise InputError(
            f"{path}: expected {expected[0]} items and {expected[1]} samples as in {dataset.folder}, "
            f"found {found[0]} and {found[1]}"
        )
    return outputs


class CRM:
    """A trained CRM on the CPU, ready for samples that it need not know.

    Args:
        folder: of `rellax crm`.
        dataset: the one it was trained on, or a newer one of the same items.

    Raises:
        InputError: a file is missing or damaged, or the CRM was trained on another data set.
    """

    def __init__(self, folder: str | Path, dataset: Dataset) -> None:
        path = crm_file(folder, WEIGHTS)
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: expected the weights of a CRM ({one_line(error)})") from None
        numbers = sum(tensor.numel() for tensor in weights.values())
        config = _read_config(Path(folder) / "config.json", numbers)
        device = torch.device("cpu")
        self._features = _Features(dataset, Vocabulary.read(Path(folder) / VOCABULARY), config, device)
        with torch.random.fork_rng(devices=[]):
            self._model = _build(self._features, config, device)
        try:
            self._model.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path}: expected the weights of a CRM for {dataset.folder} ({reason})"
            ) from None

    def predict(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """What `CRMOutputs` has for the samples of `dataset`: the same items, and any users.

        Returns:
            instance embeddings (S, d_u) and probabilities (S,).

        Raises:
            InputError: a user is new and the CRM reads user ids.
        """
        blocks = list(_outputs(self._model, self._features.of(dataset), np.arange(len(dataset.samples))))
        hidden, probabilities = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return _instance_embeddings(self._model, hidden), probabilities


def _read_config(path: Path, numbers: int) -> CRMConfig:
    """The configuration of a model that has at most so many numbers: it is built before they are read."""
    values, known = read_json(path, maker="rellax crm"), asdict(CRMConfig())
    if not isinstance(values, dict) or not values.keys() <= known.keys():
        raise InputError(f"{path}: expected the configuration of `rellax crm`, found another")
    for name, value in values.items():
        if not _is_like(value, known[name]):
            raise InputError(f"{path}: expected a {name} like {known[name]!r}, found {value!r}")
    config = CRMConfig(**values | {"hidden": tuple(values.get("hidden", known["hidden"]))})
    widths = (config.embedding_dim, *config.hidden)
    if sum(a * b for a, b in itertools.pairwise(widths)) > numbers:
        raise InputError(f"{path}: expected the widths of the weights beside it, found {widths}")
    return config


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value from JSON is of the kind of a field's default; None stands for a number, or none."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(type(width) is int and width > 0 for width in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default) or (default is None and type(value) is int)


def _build(features: _Features, config: CRMConfig, device: torch.device) -> BaseModel:
    if config.model == "DeepFM":
        from rellax.ctr import deepfm as module
    else:
        module = importlib.import_module(f"model_zoo.LongCTR.{config.model}.{config.model}")
    model: BaseModel = getattr(module, config.model)(
        features.feature_map(config.embedding_dim),
        gpu=-1 if device.type == "cpu" else device.index or 0,
        embedding_dim=config.embedding_dim,
        dnn_hidden_units=list(config.hidden),
        parallel_dnn_hidden_units=list(config.hidden),  # what DCNv2 calls it
        net_dropout=config.dropout,
        embedding_regularizer=config.regularizer,
        learning_rate=config.lr,
        optimizer="adam",
        loss="binary_crossentropy",
        # A two-stage model attends to the newer half of the behaviours, and to the half that it picks.
        short_seq_len=config.max_len // 2,
        topk=config.max_len // 2,
        # For the training loop of FuxiCTR, which is not used, and still asked for.
        metrics=["AUC"],
        model_root="",
        verbose=0,
    )
    model.register_buffer("hidden_scale", torch.ones((), device=device))
    return model


def _fit(model: BaseModel, features: _Features, dataset: Dataset, config: CRMConfig) -> dict[str, Any]:
    """Train `model` and leave it in the state with the best validation AUC."""
    train = torch.from_numpy(_training_samples(dataset, config))
    valid = dataset.indices("valid")
    labels = dataset.samples.label[valid]
    if labels.min() == labels.max():
        raise InputError(
            f"{dataset.folder}: expected both labels in the validation split, found only {labels[0]}; "
            "more interactions, or another positive_above in the map of `rellax prepare`, may give both"
        )
    batch_size = config.batch_size or min(max(len(train) // 32, 64), 1024)
    per_epoch = math.ceil(len(train) / batch_size)
    curve: list[tuple[int, float]] = []
    best_step, best_auc, best_state = 0, -math.inf, model.state_dict()
    with tqdm(total=config.epochs * per_epoch, desc=config.model, unit="batch") as bar:
        for step, samples in enumerate(_batches(train, batch_size, config.epochs), start=1):
            _step(model, features, samples)
            bar.update()
            if step % math.ceil(per_epoch / _EVALUATIONS):
                continue
            predicted = torch.cat([block for _, block in _outputs(model, features, valid)])
            auc = float(roc_auc_score(labels, predicted))
            curve.append((step, auc))
            bar.set_postfix(valid_auc=f"{auc:.4f}")
            if auc > best_auc:
                best_step, best_auc, best_state = step, auc, copy.deepcopy(model.state_dict())
            elif sum(later > best_step for later, _ in curve) >= config.patience:
                break
    model.load_state_dict(best_state)
    return {"best_step": best_step, "valid_auc": curve}


def _training_samples(dataset: Dataset, config: CRMConfig) -> np.ndarray:
    chosen = dataset.choose("train", config.shots, config.seed, name="shots")
    if config.hold_out is None:
        return chosen
    held_out = dataset.choose("train", config.hold_out, config.seed, name="hold_out")
    chosen = np.setdiff1d(chosen, held_out, assume_unique=True)
    if not len(chosen):
        raise InputError(
            f"hold_out: expected fewer than the training samples, got all {config.hold_out} of them"
        )
    return chosen


def _batches(train: Tensor, batch_size: int, epochs: int) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from train[torch.randperm(len(train))].split(batch_size)


def _step(model: BaseModel, features: _Features, samples: Tensor) -> None:
    model.train()
    loss = model.compute_loss(model(features.batch(samples)), features.labels[samples])
    model.optimizer.zero_grad()
    loss.backward()
    model.optimizer.step()


def _logit(model: BaseModel) -> nn.Linear:
    """The layer after the last hidden one."""
    head = model.fc if hasattr(model, "fc") else model.dnn.mlp  # DCNv2's; that of all others
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def _outputs(model: BaseModel, features: _Features, samples: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Last hidden layer (n, hidden) and probability (n,) of some samples after others, on the CPU."""
    model.eval()
    hidden: list[Tensor] = []
    hook = _logit(model).register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].cpu()))
    try:
        for chunk in torch.from_numpy(samples).split(_PREDICT_BATCH):
            probabilities = model(features.batch(chunk))["y_pred"].squeeze(1).cpu()
            yield hidden.pop(), probabilities
    finally:
        hook.remove()


def _measure_hidden(model: BaseModel, features: _Features, samples: np.ndarray) -> None:
    """Set `hidden_scale` to the last hidden layer's root mean square over `samples`, or over some of many."""
    some = samples[:: 1 + len(samples) // _MEASURED]
    squares = [layer.double().square().mean(1) for layer, _ in _outputs(model, features, some)]
    model.hidden_scale.fill_(float(torch.cat(squares).mean().sqrt()) or 1.0)


def _instance_embeddings(model: BaseModel, layer: Tensor) -> Tensor:
    """The last hidden layer (n, hidden) as `CRMOutputs` has it, (n, hidden + 2)."""
    constant = _SPREAD * math.sqrt((layer.shape[1] + 2) / 2)
    constants = torch.tensor([constant, -constant]).expand(len(layer), 2)
    return torch.cat([layer / model.hidden_scale.cpu(), constants], dim=1)


class _Features:
    """What a CRM reads: categorical codes, gathered per batch.

    Features have names of ours, as those of the data may be any. On the item side code 0 is padding. The
    rating is a feature of behaviours only: the target, which the models read as one more item, has the code
    for "unknown" there.
    """

    def __init__(
        self, dataset: Dataset, vocabulary: Vocabulary, config: CRMConfig, device: torch.device
    ) -> None:
        self.device, self.max_len, self._vocabulary = device, config.max_len, vocabulary
        self.unknown_rating = len(vocabulary.ratings) + 1
        self._of_users = {f"user_{n}": feature for n, feature in enumerate(vocabulary.users)}
        self._of_items = {f"item_{n}": feature for n, feature in enumerate(vocabulary.items)}
        self.items = {"item": torch.arange(dataset.items.num_rows + 1, device=device)}
        self.items |= {
            name: self._tensor(np.append(0, feature.codes(dataset.items) + 1))
            for name, feature in self._of_items.items()
        }

    def of(self, dataset: Dataset) -> _Features:
        """The same, with the users and samples of a data set of the same items.

        What is not known of a user is what most users have.

        Raises:
            InputError: a user is new, and users' ids are a feature.
        """
        other = copy.copy(self)
        other._read(dataset)
        return other

    def _read(self, dataset: Dataset) -> None:
        samples, ratings = dataset.samples, self._vocabulary.rating_codes(dataset.behaviour_ratings)
        self.users = {
            name: self._tensor(feature.codes(dataset.users)) for name, feature in self._of_users.items()
        }
        self.behaviour_items = self._tensor(dataset.behaviour_items) + 1
        self.behaviour_ratings = self._tensor(ratings) + 1
        self.sample_user = self._tensor(samples.user)
        self.sample_item = self._tensor(samples.item) + 1
        self.start = self._tensor(dataset.offsets[samples.user])
        self.end = self.start + self._tensor(samples.position)
        self.labels = self._tensor(samples.label).float().unsqueeze(1)

    def batch(self, samples: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What the models read: user features, item features of behaviours and target, and a mask.

        User features are (B,), item features (B * (max_len + 1),): right-aligned behaviours, then the target.
        The mask (B, max_len) is 1 where there is a behaviour.
        """
        samples = samples.to(self.device)
        rows = self.end[samples, None] - self.max_len + torch.arange(self.max_len, device=self.device)
        mask = rows >= self.start[samples, None]
        rows = rows.clamp(min=0)
        target = self.sample_item[samples, None]
        items = torch.cat([self.behaviour_items[rows] * mask, target], dim=1).flatten()
        unknown = torch.full_like(target, self.unknown_rating)
        ratings = torch.cat([self.behaviour_ratings[rows] * mask, unknown], dim=1).flatten()
        user_inputs = {name: codes[self.sample_user[samples]] for name, codes in self.users.items()}
        item_inputs = {name: codes[items] for name, codes in self.items.items()}
        return user_inputs, {**item_inputs, "rating": ratings}, mask.float()

    def feature_map(self, embedding_dim: int) -> FeatureMap:
        """The features in FuxiCTR's terms."""
        from fuxictr.features import FeatureMap

        feature_map = FeatureMap(dataset_id="", data_dir="")
        feature_map.default_emb_dim = embedding_dim
        for name, feature in self._of_users.items():
            feature_map.features[name] = _categorical("user", len(feature.values))
        sizes = {"item": len(self.items["item"])}
        sizes |= {name: 1 + len(feature.values) for name, feature in self._of_items.items()}
        for name, size in (sizes | {"rating": self.unknown_rating + 1}).items():
            feature_map.features[name] = _categorical("item", size, padding_idx=0)
        return feature_map

    def item_embeddings(self, model: BaseModel) -> Tensor:
        """(N, E): the embeddings of each item's id and features side by side."""
        tables = model.embedding_layer.embedding_layer.embedding_layers
        rows = [tables[name].weight.detach()[codes[1:]] for name, codes in self.items.items()]
        return torch.cat(rows, dim=1).cpu()

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


def _categorical(source: str, vocab_size: int, **options: int) -> dict[str, Any]:
    return {"source": source, "type": "categorical", "vocab_size": vocab_size, **options}
