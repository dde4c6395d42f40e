"""CRM: learns a planted signal, sees nothing it must not, hands out its last hidden layer, repeats itself."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from raw_data import random_interactions, write_ml_100k
from torch import nn

from rellax.ctr import crm, runs
from rellax.ctr.config import CRM_MODELS, CRMConfig
from rellax.ctr.crm import load_crm, make_crm, train_crm
from rellax.ctr.dataset import SPLITS, Dataset
from rellax.ctr.prepare import prepare
from rellax.ctr.sources import read_ml_100k
from rellax.ctr.vocabulary import Vocabulary
from rellax.errors import InputError

USERS, ITEMS = 50, 60
POOLED = ("DCNv2", "DeepFM")  # read the mean of the behaviours: which rating was whose is lost
CONFIG = CRMConfig(max_len=12, embedding_dim=8, hidden=(24, 7), epochs=20, patience=6, lr=5e-3, batch_size=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users like films of one genre: earlier ratings and genres tell the label, the target alone cannot."""
    folder = tmp_path_factory.mktemp("crm")
    rows = random_interactions(USERS, ITEMS, per_user=45, seed=2)
    prepare(read_ml_100k(write_ml_100k(folder / "raw", rows, USERS, ITEMS)), folder / "data")
    return Dataset.load(folder / "data")


def features_of(dataset: Dataset, config: CRMConfig = CONFIG) -> crm._Features:
    vocabulary = Vocabulary.of(dataset, user_id=config.user_id)
    return crm._Features(dataset, vocabulary, config, torch.device("cpu")).of(dataset)


@pytest.mark.parametrize("model", CRM_MODELS)
def test_learns_taste_from_earlier_ratings(dataset: Dataset, tmp_path: Path, model: str) -> None:
    config = dataclasses.replace(CONFIG, model=model)
    metrics = train_crm(dataset, tmp_path / "crm", config)
    assert metrics["test"]["auc"] > (0.65 if model in POOLED else 0.9)
    assert metrics["valid"]["auc"] == pytest.approx(max(auc for _, auc in metrics["valid_auc"]), abs=1e-9)

    outputs = load_crm(tmp_path / "crm", dataset)
    assert outputs.item_embeddings.shape == (ITEMS, 8 * 3)  # id, genres, year
    assert outputs.instance_embeddings.shape == (len(dataset.samples), hidden_size(model) + 2)
    assert outputs.probabilities.shape == (len(dataset.samples),)
    assert all(value.dtype == torch.float32 for value in vars(outputs).values())
    rows = dataset.indices("test")
    predicted = pq.read_table(tmp_path / "crm" / "predictions.parquet")
    assert predicted["probability"].to_numpy()[rows] == pytest.approx(outputs.probabilities[rows].numpy())
    assert metrics["test"]["acc"] == np.mean(
        (outputs.probabilities[rows].numpy() >= 0.5) == dataset.samples.label[rows]
    )
    assert json.loads((tmp_path / "crm" / "config.json").read_text())["model"] == model
    assert {path.name for path in (tmp_path / "crm").iterdir()} == {
        "outputs.safetensors",
        "model.safetensors",
        "vocabulary.json",
        "predictions.parquet",
        "metrics.json",
        "config.json",
        "inputs.json",
        "environment.json",
        "curves.png",
    }


def test_the_targets_own_rating_changes_nothing(dataset: Dataset, tmp_path: Path) -> None:
    """Flip rating and label of those test samples that are in nobody's history: their users' last behaviours.

    As training is deterministic and never reads the test split, everything stays the same to the last bit.
    """
    s = dataset.samples
    is_last = s.position == np.diff(dataset.offsets)[s.user] - 1
    flipped = np.flatnonzero(is_last & (s.split == SPLITS.index("test")))
    assert len(flipped) > USERS // 3
    ratings, labels = dataset.behaviour_ratings.copy(), s.label.copy()
    ratings[dataset.offsets[s.user[flipped]] + s.position[flipped]] = np.where(labels[flipped] == 1, 1, 5)
    labels[flipped] = 1 - labels[flipped]
    other = dataclasses.replace(
        dataset, behaviour_ratings=ratings, samples=dataclasses.replace(s, label=labels)
    )
    config = dataclasses.replace(CONFIG, epochs=2)
    first, second = train_crm(dataset, tmp_path / "a", config), train_crm(other, tmp_path / "b", config)
    assert first["test"]["auc"] != second["test"]["auc"]
    one, two = load_crm(tmp_path / "a", dataset), load_crm(tmp_path / "b", other)
    assert torch.equal(one.probabilities, two.probabilities)
    assert torch.equal(one.instance_embeddings, two.instance_embeddings)
    assert torch.equal(one.item_embeddings, two.item_embeddings)


def test_inputs_are_the_latest_behaviours_and_an_unrated_target(dataset: Dataset) -> None:
    features = features_of(dataset)
    samples = np.array([0, 100, 999, len(dataset.samples) - 1])
    users, items, mask = features.batch(torch.from_numpy(samples))
    items = {name: codes.view(len(samples), CONFIG.max_len + 1) for name, codes in items.items()}
    assert set(users) == {"user_0", "user_1", "user_2"}  # gender, age group, occupation
    assert set(items) == {"item", "item_0", "item_1", "rating"}  # genres and year
    for row, sample in enumerate(samples):
        rows = dataset.history(sample)
        seen = range(max(rows.start, rows.stop - CONFIG.max_len), rows.stop)
        padding = [0] * (CONFIG.max_len - len(seen))
        assert mask[row].tolist() == padding + [1] * len(seen)
        target = int(dataset.samples.item[sample])
        behaviours = [int(dataset.behaviour_items[i]) + 1 for i in seen]
        assert items["item"][row].tolist() == [*padding, *behaviours, target + 1]
        # Ratings 1 to 5 have the codes 1 to 5, and 6 is "unknown".
        assert items["rating"][row].tolist() == [
            *padding,
            *dataset.behaviour_ratings[list(seen)].astype(int),
            6,
        ]
        assert not items["item_0"][row][: len(padding)].any()
    genres = dataset.items["genres"].to_pylist()
    codes = items["item_0"][:, -1].tolist()
    targets = [genres[item] for item in dataset.samples.item[samples]]
    assert [a == b for a in codes for b in codes] == [a == b for a in targets for b in targets]


def test_the_user_id_is_a_feature_on_demand(dataset: Dataset) -> None:
    config = dataclasses.replace(CONFIG, user_id=True)
    features = features_of(dataset, config)
    users, _, _ = features.batch(torch.tensor([3, 500]))
    assert users["user_3"].tolist() == dataset.samples.user[[3, 500]].tolist()


def hidden_size(model: str) -> int:
    """The last hidden layer, without the two constants. DCNv2's has its cross network's output beside the
    MLP's 7: 3 user fields and 4 of the target and of the behaviours each, of 8."""
    return 7 + 8 * (3 + 4 + 4) if model == "DCNv2" else 7


@pytest.mark.parametrize(
    "name", [name for name in CRM_MODELS if name != "DeepFM"]
)  # its logit has other parts
def test_instance_embeddings_are_the_last_hidden_layer(dataset: Dataset, name: str) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, model=name)
    features = features_of(dataset, config)
    model = crm._build(features, config, torch.device("cpu"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    [(hidden, probabilities)] = crm._outputs(model, features, np.arange(77))
    logit = model.fc if name == "DCNv2" else model.dnn.mlp[-2]
    assert (logit.in_features, logit.out_features) == (hidden_size(name), 1)
    assert torch.allclose(torch.sigmoid(logit(hidden)).squeeze(1), probabilities, atol=1e-6)
    assert hidden.std() > 0.01
    # No trace of the hook stays, and padding rows of other samples in the batch change nothing.
    assert not logit._forward_pre_hooks
    [(alone, _)] = crm._outputs(model, features, np.arange(5, 6))
    assert torch.allclose(alone[0], hidden[5], atol=1e-6)


def test_a_layer_norm_leaves_the_lengths_of_instance_embeddings(dataset: Dataset, tmp_path: Path) -> None:
    train_crm(dataset, tmp_path / "crm", dataclasses.replace(CONFIG, epochs=1))
    embeddings = load_crm(tmp_path / "crm", dataset).instance_embeddings
    model = crm.CRM(tmp_path / "crm", dataset)._model
    features = features_of(dataset)
    layer = torch.cat([block for block, _ in crm._outputs(model, features, np.arange(len(embeddings)))])
    hidden = embeddings[:, :-2]
    assert torch.allclose(hidden * model.hidden_scale, layer, atol=1e-5)
    train = hidden[dataset.indices("train")]
    assert torch.allclose(train.square().mean(), torch.ones(()))
    normed = nn.functional.layer_norm(embeddings, embeddings.shape[1:])[:, :-2]
    lengths = [(rows - rows.mean(1, keepdim=True)).norm(dim=1) for rows in (hidden, normed)]
    assert lengths[0].std() > 0.1 * lengths[0].mean()
    assert torch.corrcoef(torch.stack(lengths))[0, 1] > 0.95


def test_instance_embeddings_of_new_samples(dataset: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    train_crm(dataset, tmp_path / "crm", config)
    known = load_crm(tmp_path / "crm", dataset)
    rows = np.array([3, 500, 7])
    taken = {name: values[rows] for name, values in vars(dataset.samples).items()}
    taken["label"] = np.full(3, -1, dtype=np.int8)
    new = dataclasses.replace(dataset, samples=dataclasses.replace(dataset.samples, **taken))
    found, probabilities = crm.CRM(tmp_path / "crm", dataset).predict(new)
    assert torch.allclose(found, known.instance_embeddings[rows], atol=1e-6)
    assert torch.allclose(probabilities, known.probabilities[rows], atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-2)

    (tmp_path / "crm" / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"model.safetensors: expected the weights of a CRM"):
        crm.CRM(tmp_path / "crm", dataset)
    with pytest.raises(InputError, match="expected a file of `rellax crm`, found none"):
        crm.CRM(tmp_path, dataset)


@pytest.mark.parametrize(
    ("users", "items"),
    [
        (("city", "type", "values"), ("rating", "city")),
        (("a.b", "float", "item_0"), ("items", "a.b")),
    ],
    ids=["collisions", "dots"],
)
def test_what_features_are_called_changes_nothing(
    dataset: Dataset, tmp_path: Path, users: tuple[str, ...], items: tuple[str, ...]
) -> None:
    config = dataclasses.replace(CONFIG, epochs=1)
    renamed = dataclasses.replace(
        dataset,
        users=dataset.users.rename_columns([*dataset.users.column_names[:3], *users]),
        items=dataset.items.rename_columns([*dataset.items.column_names[:4], *items]),
        meta=dataset.meta | {"features": {"user": list(users), "item": list(items)}},
    )
    train_crm(dataset, tmp_path / "plain", config)
    train_crm(renamed, tmp_path / "renamed", config)
    plain, other = load_crm(tmp_path / "plain", dataset), load_crm(tmp_path / "renamed", renamed)
    assert torch.equal(plain.instance_embeddings, other.instance_embeddings)
    assert torch.equal(plain.item_embeddings, other.item_embeddings)
    served = crm.CRM(tmp_path / "renamed", renamed).predict(renamed)[1]
    assert torch.allclose(served, plain.probabilities, atol=1e-6)


def with_new_user(dataset: Dataset, person: dict[str, str], shift: float = 0.0) -> Dataset:
    """The data with a new first user, who did what the first one of before did, with other ratings."""
    values = {name: [person.get(name, "new")] for name in dataset.users.column_names[1:]}
    row = pa.table({"user": pa.array([0], pa.int32())} | values)
    end, samples = int(dataset.offsets[1]), dataset.samples
    own = samples.user == 0
    columns = {name: np.concatenate([values[own], values]) for name, values in vars(samples).items()}
    columns["user"][own.sum() :] += 1
    return dataclasses.replace(
        dataset,
        users=pa.concat_tables([row, dataset.users]),
        behaviour_items=np.concatenate([dataset.behaviour_items[:end], dataset.behaviour_items]),
        behaviour_ratings=np.concatenate(
            [dataset.behaviour_ratings[:end] + np.float32(shift), dataset.behaviour_ratings]
        ),
        offsets=np.concatenate([[0], dataset.offsets + end]),
        samples=dataclasses.replace(samples, **columns),
    )


def test_newer_data_read_as_the_crm_learnt_them(dataset: Dataset, tmp_path: Path) -> None:
    """What it never saw of a user is what most have, a rating the nearest one; others stay what they were."""
    train_crm(dataset, tmp_path / "crm", dataclasses.replace(CONFIG, epochs=4))
    known = load_crm(tmp_path / "crm", dataset).probabilities
    columns = {name: dataset.users[name].to_pylist() for name in dataset.meta["features"]["user"]}
    usual = {name: max(sorted(set(values)), key=values.count) for name, values in columns.items()}
    assert usual["age_group"] != min(columns["age_group"])
    plain = with_new_user(dataset, usual)
    newer = with_new_user(dataset, {"gender": "A", "age_group": "0", "occupation": "x"}, shift=0.4)
    expected, found = (crm.CRM(tmp_path / "crm", data).predict(data)[1] for data in (plain, newer))
    new = len(newer.samples) - len(dataset.samples)
    assert torch.equal(found, expected)
    assert torch.allclose(found[new:], known, atol=1e-6)
    odd = with_new_user(dataset, usual | {"age_group": columns["age_group"][1]})
    assert not torch.allclose(crm.CRM(tmp_path / "crm", odd).predict(odd)[1], expected, atol=1e-6)

    lacking = dataclasses.replace(dataset, users=dataset.users.drop_columns("gender"))
    with pytest.raises(InputError, match="features: expected 'gender', which the CRM reads, found user, "):
        crm.CRM(tmp_path / "crm", lacking).predict(lacking)


def test_newer_data_and_a_crm_that_reads_user_ids(dataset: Dataset, tmp_path: Path) -> None:
    train_crm(dataset, tmp_path / "crm", dataclasses.replace(CONFIG, user_id=True, epochs=4))
    newer = with_new_user(dataset, {"user_id": "0"})
    served = crm.CRM(tmp_path / "crm", newer)
    known = load_crm(tmp_path / "crm", dataset).probabilities
    assert torch.allclose(served.predict(dataset)[1], known, atol=1e-6)
    moved = dataset.users.set_column(0, "user", pa.array(range(1, USERS + 1), pa.int32()))
    found = served.predict(dataclasses.replace(dataset, users=moved))[1]
    assert torch.allclose(found, known, atol=1e-6)  # ids are those of the raw data, which stay
    with pytest.raises(InputError, match="user_id: expected one that the CRM was trained on, got another"):
        served.predict(newer)


@pytest.mark.parametrize(
    "change",
    [
        {"ratings": []},
        {"ratings": ["many"]},
        {"users": [{"column": "gender", "values": ["F", "M"], "usual": 2}]},
        {"users": [{"column": "gender", "values": ["F", 3], "usual": 0}]},
        {"items": [{"column": "genres", "values": "all", "usual": 0}]},
        {"items": ["genres"]},
    ],
    ids=str,
)
def test_a_bad_vocabulary(dataset: Dataset, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "vocabulary.json"
    Vocabulary.of(dataset, user_id=True).write(path)
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | change))
    with pytest.raises(InputError, match=r"vocabulary.json: expected the vocabulary of `rellax crm`"):
        Vocabulary.read(path)
    path.write_text(json.dumps(right))
    Vocabulary.read(path).write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == right


def test_a_crm_of_other_data_is_named_and_made_anew(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, folder, config = tmp_path / "data", tmp_path / "din", dataclasses.replace(CONFIG, epochs=1)
    shutil.copytree(dataset.folder, data)

    def made() -> int:
        make_crm(data, folder, config, device="cpu")
        return folder.stat().st_ino

    caplog.set_level(logging.INFO, "rellax")

    def change(column: str) -> Dataset:
        items = pq.read_table(data / "items.parquet")
        values = [f"other {value}" for value in items[column].to_pylist()]
        place = items.column_names.index(column)
        pq.write_table(items.set_column(place, column, pa.array(values)), data / "items.parquet")
        return Dataset.load(data)

    first = made()
    load_crm(folder, change("title"))  # which a CRM does not read
    assert made() == first
    assert not caplog.records
    with pytest.raises(InputError, match="found one of other data"):
        load_crm(folder, change("year"))
    rows = random_interactions(USERS, ITEMS, per_user=45, seed=3)
    prepare(read_ml_100k(write_ml_100k(tmp_path / "raw", rows, USERS, ITEMS)), data)
    newer = Dataset.load(data)
    with pytest.raises(InputError, match=r"din: expected a CRM of the data in .*data, .* `rellax crm din`"):
        load_crm(folder, newer)
    crm.CRM(folder, newer).predict(newer)  # new behaviours may be served

    second = made()
    assert second != first
    assert "din is of other data, or of an earlier version, and is trained anew" in caplog.text
    load_crm(folder, newer)
    (folder / "inputs.json").unlink()
    load_crm(folder, newer)
    assert made() != second


def test_one_process_at_a_time_works_in_a_folder(dataset: Dataset, tmp_path: Path) -> None:
    with (
        runs.locked(tmp_path / "din"),
        pytest.raises(InputError, match="din: expected no other process at work there, found one"),
    ):
        make_crm(dataset.folder, tmp_path / "din", dataclasses.replace(CONFIG, epochs=1), device="cpu")
    assert not list(tmp_path.iterdir())


def test_few_shots_and_the_global_generator_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    config = dataclasses.replace(CONFIG, shots=200, epochs=1, batch_size=None)
    metrics = train_crm(dataset, tmp_path / "crm", config)
    assert torch.equal(torch.rand(3), expected)
    assert [step for step, _ in metrics["valid_auc"]] == [2, 4]  # 200 samples in batches of 64
    with pytest.raises(InputError, match="got 99999"):
        train_crm(dataset, tmp_path / "none", dataclasses.replace(CONFIG, shots=99999))
    assert not (tmp_path / "none").exists()


def test_held_out_samples_are_not_trained_on(dataset: Dataset, tmp_path: Path) -> None:
    """Their labels decide nothing, those of others do: the same bits come out, or others."""
    config = dataclasses.replace(CONFIG, hold_out=500, seed=3, epochs=1)
    held_out = dataset.choose("train", 500, 3)

    def trained(flipped: np.ndarray, name: str) -> torch.Tensor:
        labels = dataset.samples.label.copy()
        labels[flipped] = 1 - labels[flipped]
        other = dataclasses.replace(dataset, samples=dataclasses.replace(dataset.samples, label=labels))
        train_crm(other, tmp_path / name, config)
        return load_crm(tmp_path / name, dataset).probabilities

    plain = trained(held_out[:0], "plain")
    assert torch.equal(trained(held_out, "held out"), plain)
    others = np.setdiff1d(dataset.indices("train"), held_out)
    assert not torch.equal(trained(others[:100], "others"), plain)
    everything = dataclasses.replace(config, hold_out=len(dataset.indices("train")))
    with pytest.raises(InputError, match="hold_out: expected fewer than the training samples, got all 1600"):
        train_crm(dataset, tmp_path / "none", everything)


def test_deepfm_is_a_factorization_machine_and_an_mlp(dataset: Dataset) -> None:
    """Its logit, term by term, from the embeddings of the fields."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, model="DeepFM", dropout=0.0)
    features = features_of(dataset, config)
    model = crm._build(features, config, torch.device("cpu")).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for table in (module for module in model.modules() if getattr(module, "padding_idx", None) == 0):
        nn.init.zeros_(table.weight[0])
    users, items, mask = features.batch(torch.arange(20, 26))
    with torch.no_grad():
        found = torch.logit(model((users, items, mask))["y_pred"])
        fields: dict[str, list[torch.Tensor]] = {"linear": [], "embedding_layer": []}
        for name, rows in fields.items():
            tables = getattr(model, name).embedding_layer.embedding_layers
            rows += [tables[field](codes) for field, codes in users.items()]
            looked_up = [tables[field](codes.view(6, -1)) for field, codes in items.items()]
            rows += [values[:, -1] for values in looked_up]
            weights = (mask / mask.sum(dim=1, keepdim=True)).unsqueeze(2)
            rows += [(values[:, :-1] * weights).sum(dim=1) for values in looked_up]
        expected = torch.stack(fields["linear"]).sum(dim=0) + model.bias
        rows = fields["embedding_layer"]
        for i, one in enumerate(rows):
            for other in rows[:i]:
                expected += (one * other).sum(dim=1, keepdim=True)
        expected += model.dnn(torch.cat(rows, dim=1))
    assert torch.allclose(found, expected, atol=1e-4)


def test_patience_ends_training_and_the_best_state_is_kept(dataset: Dataset, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=30, patience=2)
    metrics = train_crm(dataset, tmp_path / "crm", config)
    steps, aucs = zip(*metrics["valid_auc"], strict=True)
    assert metrics["best_step"] == steps[int(np.argmax(aucs))]
    assert len(steps) - 1 - int(np.argmax(aucs)) == 2
    assert metrics["valid"]["auc"] == pytest.approx(max(aucs), abs=1e-9)


def test_an_auc_of_zero_is_better_than_none(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crm, "roc_auc_score", lambda *_: 0.0)
    metrics = train_crm(dataset, tmp_path / "crm", dataclasses.replace(CONFIG, epochs=1))
    assert metrics["best_step"] == metrics["valid_auc"][0][0] > 0


@pytest.mark.parametrize("name", ["shots", "hold_out"])
def test_more_samples_than_there_are(dataset: Dataset, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: expected 1 to 1600 samples of split 'train', got 9999"):
        train_crm(dataset, tmp_path / "crm", dataclasses.replace(CONFIG, **{name: 9999}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "GRU"}, "model: expected one of DIN, SIM, ETA, SDIM, DCNv2, DeepFM, got 'GRU'"),
        ({"hidden": ()}, "hidden: expected at least one width"),
        ({"max_len": 3}, "max_len: expected at least 4 behaviours, got 3"),
        ({"shots": 5, "hold_out": 5}, "hold_out: expected it without shots"),
    ],
    ids=["model", "hidden", "max_len", "hold_out"],
)
def test_bad_config(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        CRMConfig(**options)


def test_one_class_in_the_validation_split(dataset: Dataset, tmp_path: Path) -> None:
    labels = dataset.samples.label.copy()
    labels[dataset.indices("valid")] = 1
    other = dataclasses.replace(dataset, samples=dataclasses.replace(dataset.samples, label=labels))
    words = "both labels in the validation split, found only 1; more interactions, .* may give both"
    with pytest.raises(InputError, match=words):
        train_crm(other, tmp_path / "crm", CONFIG)


def test_bad_outputs(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"outputs.safetensors: expected a file of `rellax crm`, found none"):
        load_crm(tmp_path, dataset)
    (tmp_path / "outputs.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match="damaged"):
        load_crm(tmp_path, dataset)
    train_crm(dataset, tmp_path / "crm", dataclasses.replace(CONFIG, epochs=1))
    (tmp_path / "crm" / "inputs.json").unlink()
    short = dataclasses.replace(dataset, items=dataset.items.slice(0, 59))
    with pytest.raises(InputError, match=r"expected 59 items and 2000 samples .* found 60 and 2000"):
        load_crm(tmp_path / "crm", short)
