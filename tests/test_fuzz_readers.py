"""Damaged files of every kind that is read: a sentence, or a right result, and nothing half-written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import at_most_one_sentence, examples, one_sentence
from hypothesis import given
from hypothesis import strategies as st
from raw_data import random_interactions, write_bookcrossing, write_ml_1m, write_ml_25m, write_ml_100k
from workspace import Workspace

from rellax._files import sha256_file
from rellax.ctr import predict
from rellax.ctr.calibration import read_calibration
from rellax.ctr.crm import CRM
from rellax.ctr.dataset import COLUMNS as COLUMNS_OF
from rellax.ctr.dataset import Dataset
from rellax.ctr.prepare import prepare
from rellax.ctr.prompts import Wording
from rellax.ctr.sources import READERS, Source, read_own
from rellax.ctr.stream import stream, stream_ids
from rellax.subr import read_retrieved

USERS, ITEMS = 12, 20
ROWS = random_interactions(USERS, ITEMS, 12, seed=0)


def bookcrossing(folder: Path) -> Path:
    ratings = [f'"{user}";"{item}";"{rating * 2}"' for user, item, rating, _ in ROWS]
    books = [f'"{i}";"Film {i}";"Someone";"19{i:02}";"House";"a";"b";"c"' for i in range(1, ITEMS + 1)]
    return write_bookcrossing(
        folder, ratings, books, [f'"{u}";"a, b, c";"3{u % 10}"' for u in range(1, USERS + 1)]
    )


def own(folder: Path) -> Path:
    folder.mkdir(parents=True)
    events = ["who,what,stars,when", *(f"{u},{i},{r},{t}" for u, i, r, t in ROWS)]
    (folder / "events.csv").write_text("\n".join(events) + "\n")
    things = {
        "id": [str(i) for i in range(1, ITEMS + 1)],
        "name": [f"Thing {i}" for i in range(1, ITEMS + 1)],
    }
    pq.write_table(pa.table(things), folder / "things.parquet")
    (folder / "columns.json").write_text(json.dumps(COLUMNS))
    return folder


COLUMNS: dict[str, Any] = {
    "name": "shop",
    "item_noun": "thing",
    "interactions": {"file": "events.csv", "user": "who", "item": "what", "rating": "stars", "time": "when"},
    "rating_scale": [1, 5],
    "positive_above": 3,
    "items": {"file": "things.parquet", "item": "id", "title": "name"},
}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "ml-100k": lambda folder: write_ml_100k(folder, ROWS, USERS, ITEMS),
    "ml-1m": lambda folder: write_ml_1m(folder, ROWS, USERS, ITEMS),
    "ml-25m": lambda folder: write_ml_25m(folder, ROWS, ITEMS),
    "bookcrossing": bookcrossing,
    "own": own,
}


def read(name: str, folder: Path) -> Source:
    return read_own(folder / "columns.json") if name == "own" else READERS[name](folder)


SCRAPS = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b"::", b";", b",", b"\t", b"\n", b"\r\n", b"\r", b"-", b"nan"),
    *(
        b"inf",
        b"1e999",
        b"9" * 400,
        b"99999999999999999999",
        b"0",
        "٣".encode(),
        b"\xe9",
        b"",
        b"\x1f",
        b"\\",
    ),
)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut a file, or put something in place of some of its bytes."""
    where, length = draw(st.floats(0, 1)), draw(st.sampled_from([0, 1, 2, 5, 40]))
    scrap, cut = draw(st.sampled_from(SCRAPS) | st.binary(max_size=6)), draw(st.integers(0, 5)) == 0

    def damage(content: bytes) -> bytes:
        at = int(where * len(content))
        return content[:at] if cut else content[:at] + scrap + content[at + length :]

    return damage


@pytest.mark.parametrize("name", MAKERS)
def test_raw_files(name: str, tmp_path: Path) -> None:
    good = MAKERS[name](tmp_path / "good")
    prepare(read(name, good), tmp_path / "data")
    files = sorted(file.name for file in good.iterdir())

    @examples(60)
    @given(st.sampled_from(files), damages())
    def check(file: str, damage: Callable[[bytes], bytes]) -> None:
        raw, data = tmp_path / "raw", tmp_path / "made" / "data"
        for folder in (raw, data.parent):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, raw)
        (raw / file).write_bytes(damage((good / file).read_bytes()))
        meta = None
        with at_most_one_sentence():
            meta = prepare(read(name, raw), data)
        if meta is None:
            assert not data.parent.exists() or not list(data.parent.iterdir())
        else:
            dataset = Dataset.load(data)
            assert len(dataset.samples) == meta["counts"]["samples"] > 0

    check()


def test_a_column_twice(tmp_path: Path) -> None:
    folder = own(tmp_path / "raw")
    events = (folder / "events.csv").read_text().splitlines()
    (folder / "events.csv").write_text(
        "\n".join(["who,what,stars,stars,when", *(f"1,{row}" for row in events[1:])])
    )
    with one_sentence():
        read("own", folder)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


def test_column_maps_of_anything(tmp_path: Path) -> None:
    folder = own(tmp_path / "raw")

    @examples(100)
    @given(st.sampled_from(["", "interactions", "items", "users"]), st.data(), JUNK)
    def check(part: str, data: st.DataObject, junk: Any) -> None:
        inside = COLUMNS.get(part, {"user": "who"}) if part else COLUMNS
        names = [*inside, "delimiter", "text", "features", "question", "answers", "unknown_ids", "label"]
        changed = inside | {data.draw(st.sampled_from(names)): junk}
        (folder / "columns.json").write_text(json.dumps(COLUMNS | {part: changed} if part else changed))
        with at_most_one_sentence():
            prepare(read("own", folder), tmp_path / "made")
        shutil.rmtree(tmp_path / "made", ignore_errors=True)

    check()


@pytest.mark.parametrize("name", ["behaviours", "samples", "items", "users"])
def test_prepared_tables(name: str, workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / f"{name}.parquet"
    content = path.read_bytes()

    @examples(30)
    @given(damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(content))
        with at_most_one_sentence():
            Dataset.load(tmp_path / "data")
        with at_most_one_sentence():
            list(stream(tmp_path / "data", name, COLUMNS_OF[name]))
        if name in ("behaviours", "samples"):
            with at_most_one_sentence():
                list(stream_ids(tmp_path / "data", name, ("user", "item"), {"user": USERS, "item": ITEMS}))

    check()


def test_a_damaged_page(workspace: Workspace, tmp_path: Path) -> None:
    """The footer is whole, the page does not decompress: an OSError of Arrow's."""
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "items.parquet"
    column = pq.read_metadata(path).row_group(0).column(2)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    for at in range(start + 30, start + 70):
        content[at] ^= 0xFF
    path.write_bytes(bytes(content))
    with one_sentence():
        list(stream(tmp_path / "data", "items", ("title",)))


def test_prepared_descriptions(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.data, tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    meta = json.loads(path.read_text())

    @examples(60)
    @given(st.sampled_from(["rating_scale", "features", "answers", "timed", "item_noun", "question"]), JUNK)
    def check(field: str, junk: Any) -> None:
        path.write_text(json.dumps(meta | {field: junk}))
        with at_most_one_sentence():
            Wording.of(Dataset.load(tmp_path / "data").meta)

    check()


def test_calibrations(tmp_path: Path) -> None:
    weights = tmp_path / "adapter" / "adapter.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"any")
    (tmp_path / "model.safetensors").write_bytes(b"of a CRM")
    plain = {"temperature": 1.5, "adapter": sha256_file(weights)}
    stacked = {"weight": 0.3, "crm_weight": 0.7, "bias": -0.1, "crm": str(tmp_path)}
    stacked |= {"adapter": plain["adapter"], "crm_sha256": sha256_file(tmp_path / "model.safetensors")}

    @examples(60)
    @given(st.sampled_from([plain, stacked]), st.sampled_from(list(plain | stacked)), JUNK, damages())
    def check(right: dict, field: str, junk: Any, damage: Callable[[bytes], bytes]) -> None:
        for text in (json.dumps(right | {field: junk}).encode(), damage(json.dumps(right).encode())):
            (tmp_path / "calibration.json").write_bytes(text)
            with at_most_one_sentence():
                found = read_calibration(tmp_path)
                assert all(map(math.isfinite, (found.weight, found.crm_weight, found.bias)))
                assert found.crm is not None or found.weight > 0

    check()


def test_classical_models(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.crm, tmp_path / "crm")
    dataset, path = Dataset.load(workspace.data), tmp_path / "crm" / "config.json"
    right, weights = json.loads(path.read_text()), tmp_path / "crm" / "model.safetensors"
    content = weights.read_bytes()

    @examples(60)
    @given(st.sampled_from(["model", "hidden", "dropout", "shots", "user_id", "other"]), JUNK, damages())
    def check(field: str, junk: Any, damage: Callable[[bytes], bytes]) -> None:
        path.write_text(json.dumps(right | {field: junk}))
        weights.write_bytes(content)
        with at_most_one_sentence():
            CRM(tmp_path / "crm", dataset)
        path.write_text(json.dumps(right))
        weights.write_bytes(damage(content))
        with at_most_one_sentence():
            CRM(tmp_path / "crm", dataset)

    check()


def test_retrieved_behaviours(workspace: Workspace, tmp_path: Path) -> None:
    content = (workspace.retrieved / "retrieved.parquet").read_bytes()
    path = tmp_path / "retrieved.parquet"

    @examples(40)
    @given(damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(content))
        with at_most_one_sentence():
            list(read_retrieved(path))

    check()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_to_predict(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Indifferent:
        timed = True

        def predict(self, rows: list[dict[str, Any]], **_: Any) -> np.ndarray:
            return np.full(len(rows), 0.5)

    monkeypatch.setattr(predict, "Predictor", lambda *_, **__: Indifferent())
    path, table = (
        tmp_path / f"t{suffix}",
        {"user_id": ["1", "2"] * 9, "item_id": ["3", "4"] * 9, "time": [5, 6] * 9},
    )
    if suffix == ".csv":
        path.write_text("user_id,item_id,time\n" + "1,3,5\n2,4,6\n" * 9)
    else:
        pq.write_table(pa.table(table), path)
    content = path.read_bytes()

    @examples(60)
    @given(damages())
    def check(damage: Callable[[bytes], bytes]) -> None:
        path.write_bytes(damage(content))
        with at_most_one_sentence():
            predict.predict(tmp_path, path, tmp_path / f"out{suffix}", progress=False)

    check()
