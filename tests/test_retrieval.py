"""`rellax retrieve`: users in buckets, bounded memory, only what is new, and what survives a stop."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from rellax import subr
from rellax._files import write_json
from rellax.ctr import buckets, retrieval, stream
from rellax.ctr.buckets import Buckets
from rellax.ctr.dataset import Dataset
from rellax.ctr.retrieval import find_positions, load_embeddings, read_positions, retrieve
from rellax.errors import InputError

ITEMS, DIM, K = 40, 8, 3
Histories = dict[str, list[int]]
META = {
    "item_noun": "film",
    "timed": True,
    "rating_scale": [1, 5],
    "positive_above": 3,
    "unrated": None,
    "answers": None,
    "question": None,
    "features": {"item": [], "user": []},
}


def random_histories(users: int, seed: int = 0, longest: int = 30) -> Histories:
    rng = np.random.default_rng(seed)
    return {f"u{i:05d}": rng.integers(ITEMS, size=rng.integers(1, longest)).tolist() for i in range(users)}


def write_data(folder: Path, histories: Histories, *, first: int = 3) -> Path:
    """A data folder where every behaviour from the `first` on is a sample, sorted by position."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"i{i}" for i in range(ITEMS)]
    rows = [
        (user, item, position)
        for user, history in enumerate(histories.values())
        for position, item in enumerate(history)
    ]
    samples = sorted((row for row in rows if row[2] >= first), key=lambda row: (row[2], row[0]))
    tables = {
        "items": {"item": range(ITEMS), "item_id": ids, "title": ids, "text": ids},
        "users": {"user": range(len(histories)), "user_id": list(histories), "profile": list(histories)},
        "behaviours": columns(rows, "user", "item", "time") | {"rating": np.ones(len(rows), np.float32)},
        "samples": {"sample": range(len(samples)), **columns(samples, "user", "item", "position")},
    }
    tables["samples"] |= {
        "label": np.ones(len(samples), np.int8),
        "time": np.arange(len(samples)),
        "split": ["train"] * len(samples),
    }
    for name, table in tables.items():
        pq.write_table(
            pa.table({key: pa.array(values) for key, values in table.items()}),
            folder / f"{name}.parquet",
            row_group_size=300,
        )
    write_json(folder / "dataset.json", META)
    return folder


def columns(rows: list[tuple[int, int, int]], *names: str) -> dict[str, Any]:
    return dict(zip(names, np.array(rows, dtype=np.int32).reshape(-1, 3).T, strict=True))


def write_embeddings(folder: Path, seed: int = 0) -> None:
    table = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(seed))
    subr.save_embeddings(folder, F.normalize(table, dim=1), [f"i{i}" for i in range(ITEMS)], "random")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", random_histories(60))
    write_embeddings(tmp_path / "embeddings")
    return tmp_path


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_ROWS", 100)
    monkeypatch.setattr(stream, "_ROWS", 70)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the operator computed."""
    calls: list[int] = []

    def counting(*arguments: Any) -> Any:
        calls.append(len(arguments[3]))
        return original(*arguments)

    original = subr.retrieve
    monkeypatch.setattr(subr, "retrieve", counting)
    return calls


def run(work: Path, name: str = "retrieved", *, redo: bool = False, **more: Any) -> pa.Table:
    config = {"data": str(work / "data"), "embeddings": str(work / "embeddings"), "k": K, **more}
    retrieve(config, work / name, redo=redo, progress=False)
    return pq.read_table(work / name / "retrieved.parquet")


def test_buckets_give_what_all_users_at_once_give(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = run(work, "many")
    assert len(Buckets.load(work / "data", work / "elsewhere").jobs()) > 5
    monkeypatch.setattr(buckets, "_ROWS", 10**6)
    assert run(work, "one").equals(table)
    data = Dataset.load(work / "data")
    for k in (K, 1):
        found = read_positions(work / "many", data, k)
        np.testing.assert_array_equal(found, find_positions(load_embeddings(work / "many", data), data, k))
        assert found.dtype == np.int16
    assert table.num_rows == len(data.samples)
    assert table.schema.field("positions").type == pa.list_(pa.uint16())
    assert pq.ParquetFile(work / "many" / "retrieved.parquet").metadata.num_row_groups > 5
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_scores_are_those_of_the_operator(work: Path) -> None:
    run(work, "with", scores=True)
    data = Dataset.load(work / "data")
    samples = data.samples
    _, expected = subr.retrieve(
        subr.load_embeddings(work / "embeddings"),
        data.behaviour_items,
        data.offsets,
        samples.user,
        samples.position,
        samples.item,
        K,
    )
    for block in subr.read_retrieved(work / "with" / "retrieved.parquet"):
        np.testing.assert_allclose(block.scores, expected[block.sample], rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, int] = {}

    def watching(original: Any, rows: Callable[[Any], int]) -> Any:
        def wrapped(*arguments: Any) -> Any:
            result = original(*arguments)
            held["rows"] = max(held["rows"], rows(result))
            held["arrow"] = max(held["arrow"], pa.total_allocated_bytes() - held["before"])
            return result

        return wrapped

    columns = buckets.stream_ids
    monkeypatch.setattr(
        buckets,
        "stream_ids",
        lambda *a: (watching(lambda x: x, lambda x: len(x[1][0]))(x) for x in columns(*a)),
    )
    monkeypatch.setattr(
        Buckets,
        "read",
        watching(Buckets.read, lambda bucket: len(bucket.sample) + len(bucket.behaviour_items)),
    )
    monkeypatch.setattr(subr, "retrieve", watching(subr.retrieve, lambda result: len(result[0])))
    monkeypatch.setattr(retrieval.pq, "read_table", watching(pq.read_table, len))
    write_embeddings(tmp_path / "embeddings")
    peaks = {}
    for users in (100, 200, 1600):  # the first also pays for what Arrow keeps
        write_data(tmp_path / "data", random_histories(users))
        held |= {"rows": 0, "arrow": 0, "before": pa.total_allocated_bytes()}
        config = {"data": str(tmp_path / "data"), "embeddings": str(tmp_path / "embeddings"), "k": K}
        retrieve(config, tmp_path / str(users), progress=False)
        peaks[users] = dict(held)
    for kind in ("rows", "arrow"):
        assert peaks[200][kind] > 0
        assert peaks[1600][kind] < 2 * peaks[200][kind]


def test_what_is_finished_is_not_repeated(work: Path, computed: list[int]) -> None:
    run(work)
    before = (work / "retrieved" / "retrieved.parquet").stat().st_mtime_ns
    rows = sum(computed)
    run(work)
    assert sum(computed) == rows
    assert (work / "retrieved" / "retrieved.parquet").stat().st_mtime_ns == before
    run(work, redo=True)
    assert sum(computed) == 2 * rows


def test_new_behaviours_cost_their_own_rows_alone(work: Path, computed: list[int]) -> None:
    run(work, scores=True)
    histories = random_histories(60)
    histories["u00007"] += [1, 2]
    histories["u00031"] += [5]
    histories = {"a new user": [3, 3, 1, 4, 1, 5]} | histories  # every other user has another number now
    new = 3 + sum(
        max(len(histories[user]) - max(length, 3), 0)
        for user, length in ((user, len(history)) for user, history in random_histories(60).items())
    )
    write_data(work / "data", histories)
    computed.clear()
    incremental = run(work, scores=True)
    assert 3 < sum(computed) == new <= 6
    whole = run(work, "whole", scores=True)
    assert incremental.drop_columns("scores").equals(whole.drop_columns("scores"))
    one, two = (table["scores"].combine_chunks().flatten().to_numpy() for table in (incremental, whole))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)  # other queries beside it: other rounding
    data = Dataset.load(work / "data")
    np.testing.assert_array_equal(
        read_positions(work / "retrieved", data, K),
        find_positions(load_embeddings(work / "retrieved", data), data, K),
    )


def test_a_history_that_was_mended_is_computed_anew_from_there_on(work: Path, computed: list[int]) -> None:
    run(work)
    histories = random_histories(60)
    user = max(histories, key=lambda user: len(histories[user]))
    histories[user][10] = (histories[user][10] + 1) % ITEMS
    del histories[min(histories, key=lambda user: len(histories[user]))]
    write_data(work / "data", histories)
    computed.clear()
    mended = run(work)
    assert sum(computed) == len(histories[user]) - 10  # the mended behaviour's own sample, and all after it
    assert mended.equals(run(work, "whole"))


def test_other_embeddings_make_all_rows_new(work: Path, computed: list[int]) -> None:
    rows = run(work).num_rows
    write_embeddings(work / "embeddings", seed=1)
    computed.clear()
    again = run(work)
    assert sum(computed) == rows
    assert again.equals(run(work, "whole"))


def test_an_earlier_version_s_result_is_replaced(work: Path) -> None:
    expected = run(work)
    path = work / "retrieved" / "retrieved.parquet"
    pq.write_table(pa.table({"sample": [0], "positions": [[0]], "scores": [[0.5]]}), path)
    with pytest.raises(
        InputError, match="where an earlier version wrote it, the same command writes it anew"
    ):
        read_positions(work / "retrieved", Dataset.load(work / "data"), K)
    (work / "retrieved" / "inputs.json").unlink()
    assert run(work).equals(expected)


@pytest.mark.parametrize(
    "stop",
    [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
    ids=["ctrl-c", "full disk"],
)
def test_what_is_stopped_goes_on_with_the_next_bucket(
    work: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    rows = run(work, "whole").num_rows
    run(work)
    write_embeddings(work / "embeddings", seed=1)
    before = {path: path.read_bytes() for path in (work / "retrieved").iterdir()}
    computed.clear()
    original = subr.write_retrieved

    def stopping(*arguments: Any) -> None:
        if len(computed) == 3:
            raise stop
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(subr, "write_retrieved", stopping)
        with pytest.raises(type(stop)):
            run(work)
    assert {path: path.read_bytes() for path in (work / "retrieved").iterdir()} == before
    lost = computed.pop()
    resumed = run(work)
    assert sum(computed) == rows
    assert 0 < lost < rows
    assert resumed.equals(run(work, "other"))


def test_unfinished_work_on_other_data_is_not_taken_over(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(subr, "history_keys", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(work)
    assert (work / ".retrieved.parts").exists()
    write_data(work / "data", random_histories(9, seed=1))
    assert run(work).equals(run(work, "whole"))


@pytest.mark.parametrize("at", ["write_retrieved", "rmtree"])  # in the middle, and when the result is there
def test_one_process_at_a_time_works_in_a_folder(
    work: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    owner = {"write_retrieved": subr, "rmtree": shutil}[at]
    original = getattr(owner, at)

    def meanwhile(*arguments: Any, **options: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, at, original)
            with pytest.raises(InputError, match=r"retrieved.*: expected no other process at work there"):
                run(work, redo=True)
        original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, at, meanwhile)
        rows = run(work).num_rows
    assert sum(computed) == rows
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_a_result_of_other_samples_is_named(work: Path) -> None:
    run(work)
    histories = random_histories(60)
    histories["u00003"][-1] += 1  # as many samples, one of them another
    write_data(
        work / "data", {user: [item % ITEMS for item in history] for user, history in histories.items()}
    )
    with pytest.raises(InputError, match=r"expected the \d+ samples of .* brings it up to date"):
        read_positions(work / "retrieved", Dataset.load(work / "data"), K)
    with pytest.raises(
        InputError,
        match=f"k: expected at most the {K} behaviours of .*, got 9; `rellax retrieve --k 9 --redo`",
    ):
        read_positions(work / "retrieved", Dataset.load(work / "data"), 9)


def test_a_result_that_lacks_samples_is_named(work: Path) -> None:
    """A file that was cut between two row groups, say."""
    table = run(work)
    data = Dataset.load(work / "data")
    for lacking in (table.slice(1), table.slice(0, len(table) - 1)):
        pq.write_table(lacking, work / "retrieved" / "retrieved.parquet")
        with pytest.raises(InputError, match=rf"expected the {len(table)} samples of .* found others"):
            read_positions(work / "retrieved", data, K)


@pytest.mark.parametrize(("longest", "dtype"), [(300, np.int16), (40_000, np.int32)])
def test_positions_take_as_many_bytes_as_the_longest_history_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int, dtype: type[np.signedinteger[Any]]
) -> None:
    """The target has been seen before once, just before."""
    monkeypatch.setattr(stream, "_ROWS", 10**5)
    write_data(tmp_path / "data", {"u": [*([1] * (longest - 1)), 7, 7]}, first=longest)
    write_embeddings(tmp_path / "embeddings")
    run(tmp_path)
    positions = read_positions(tmp_path / "retrieved", Dataset.load(tmp_path / "data"), K)
    assert positions.dtype == dtype
    assert positions[0, 0] == longest - 1


def test_the_heaviest_buckets_come_first(work: Path) -> None:
    sorted_out = Buckets.load(work / "data", work / "elsewhere")
    order = [sorted_out.work[bucket] for bucket in sorted_out.longest_first()]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) > 5
    assert sum(order) == sum(sum(range(3, len(history))) for history in random_histories(60).values())
    seen: list[int] = []
    for bucket in sorted_out.jobs():
        low, high = sorted_out.key_range(bucket)
        keys, *_, samples = sorted_out.read(bucket)
        assert ((keys >= low) & (keys <= high)).all()
        assert len(samples) == sorted_out.samples[bucket]
        seen += keys.tolist()
    assert len(set(seen)) == len(seen)
    lengths = [len(history) for history in random_histories(60).values()]
    assert sum(sorted_out.samples) == sum(max(length - 3, 0) for length in lengths)
    assert sorted_out.longest == max(lengths) - 1
    assert sorted_out.key_range(0)[0] == 0
    assert sorted_out.key_range(len(sorted_out.samples) - 1)[1] == 2**64 - 1


@pytest.mark.parametrize(
    ("name", "column", "value", "words"),
    [
        ("samples", "position", 99, r"sample 0 \(user \d+, item \d+, position 99\) is not in behaviours"),
        ("samples", "item", 39, r"sample 0 \(user \d+, item 39, position 3\) is not in behaviours"),
        ("samples", "user", 60, r"row 0: expected user in 0 to 59, found 60"),
        ("behaviours", "item", 40, r"row 0: expected item in 0 to 39, found 40"),
        ("behaviours", "user", 59, r"expected rows grouped by rising user"),
    ],
)
def test_tables_that_do_not_fit_each_other(
    work: Path, name: str, column: str, value: int, words: str
) -> None:
    path = work / "data" / f"{name}.parquet"
    table = pq.read_table(path)
    values = table[column].to_numpy().copy()
    values[0] = value
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), path)
    with pytest.raises(InputError, match=words):
        run(work)
    assert not (work / "retrieved").exists()


def test_a_sample_of_a_user_without_behaviours(work: Path) -> None:
    path = work / "data" / "behaviours.parquet"
    table, user = pq.read_table(path), Dataset.load(work / "data").samples.user[0]
    pq.write_table(table.filter(pa.compute.not_equal(table["user"], user)), path)
    with pytest.raises(InputError, match=rf"user {user}, .* is not in behaviours.parquet"):
        run(work)
