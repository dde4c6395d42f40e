"""item_topk against a brute force: in fp64 where sums are exact, else in fp32 in the kernel's order."""

from __future__ import annotations

import importlib
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import item_topk
from rellax.reference import item_topk as reference

ops = importlib.import_module("rellax.ops.item_topk")  # its package gives the name to the function
both_backends = pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_table(items: int, dim: int, seed: int = 0) -> Tensor:
    table = torch.randn(items, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(table, dim=1)


def fp32_scores(embeddings: Tensor) -> np.ndarray:
    """All scores in the kernel's order: rounded products in 16 interleaved sums, added as a binary tree."""
    rows = embeddings.float().numpy()
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 16)))
    sums = np.zeros((len(rows), len(rows), 16), dtype=np.float32)
    for d in range(0, rows.shape[1], 16):
        sums += rows[:, None, d : d + 16] * rows[None, :, d : d + 16]
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    return sums[..., 0]


def assert_exact(embeddings: Tensor, k: int, exclude_self: bool, queries: Tensor | None = None) -> None:
    """Indices and bits of the scores are those of a brute force."""
    true = fp32_scores(embeddings)
    indices, scores = item_topk(embeddings, k, queries=queries, exclude_self=exclude_self)
    for row, q in enumerate(range(len(true)) if queries is None else queries.tolist()):
        expected = expected_order(true[q], q, k, exclude_self)
        assert indices[row].tolist() == expected
        assert scores[row].tolist() == [true[q, j] if j >= 0 else -np.inf for j in expected]


@pytest.fixture
def cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rellax._C")
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")


def expected_order(scores: np.ndarray, query: int, k: int, exclude_self: bool) -> list[int]:
    """Indices by falling score, equal ones by rising index; -1 past the last."""
    order = np.lexsort((np.arange(len(scores)), -scores)).tolist()
    if exclude_self:
        order.remove(query)
    return [*order[:k], *[-1] * (k - len(order))]


@both_backends
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("k", [1, 7, 40, 55])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_embeddings_give_exactly_the_brute_force(
    backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, k: int, exclude_self: bool
) -> None:
    monkeypatch.setattr(reference, "_BLOCK_SCORES", 3 * 40)  # blocks of three queries, the last one of one
    embeddings = torch.randint(-2, 3, (40, 7), generator=torch.Generator().manual_seed(1)).to(dtype)
    true = embeddings.double().numpy() @ embeddings.double().numpy().T
    indices, scores = item_topk(embeddings, k, exclude_self=exclude_self)
    for q in range(40):
        expected = expected_order(true[q], q, k, exclude_self)
        assert indices[q].tolist() == expected
        assert scores[q].tolist() == [true[q, j] if j >= 0 else -np.inf for j in expected]


@both_backends
def test_random_embeddings_give_the_best_to_rounding(backend: str) -> None:
    embeddings = random_table(500, 129)
    true = embeddings.double() @ embeddings.double().T
    rounding = 130 * 2.0**-24
    indices, scores = item_topk(embeddings, 20, exclude_self=False)
    assert (scores.double() - true.gather(1, indices)).abs().max() <= rounding
    kept = torch.zeros_like(true, dtype=torch.bool).scatter_(1, indices, True)
    assert kept.sum(1).eq(20).all()
    best_left_out = true.masked_fill(kept, -torch.inf).amax(1)
    worst_kept = true.masked_fill(~kept, torch.inf).amin(1)
    assert (best_left_out <= worst_kept + 2 * rounding).all()
    assert scores.diff(dim=1).le(0).all()


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("dim", [1, 37, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_is_that_of_the_brute_force(
    cpp: None, dtype: torch.dtype, dim: int, exclude_self: bool
) -> None:
    assert_exact(random_table(300, dim).to(dtype), 9, exclude_self)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_closer_to_each_other_than_bf16_can_tell(cpp: None, dtype: torch.dtype) -> None:
    near = random_table(1, 64) + 1e-5 * random_table(250, 64)
    assert_exact(torch.cat([near, random_table(50, 64), near[:100]]).to(dtype), 12, True)


@pytest.mark.parametrize("kind", ["equal", "two-clusters", "zero", "norms-apart"])
def test_shortlists_that_overflow(cpp: None, kind: str) -> None:
    """No bound tells the candidates apart, so that lists fill up with what has to be scored exactly."""
    row, other = random_table(2, 33).split(1)
    embeddings = {
        "equal": row.expand(400, -1),
        "two-clusters": torch.cat([row, other]).repeat(200, 1),
        "zero": torch.zeros(400, 33),
        "norms-apart": random_table(400, 33) * torch.logspace(-6, 6, 400)[:, None],
    }[kind]
    for k in (1, 5, 150):
        assert_exact(embeddings, k, True)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-19, 1e17])
def test_scores_near_the_ends_of_fp32(cpp: None, scale: float) -> None:
    assert_exact(random_table(150, 40) * scale, 7, False)


@pytest.fixture
def drawn() -> Tensor:
    """Those of 700 items that first floors are from: a Mersenne Twister draws them."""
    generator = np.random.MT19937()
    generator._legacy_seeding(5489)  # that of std::mt19937
    return torch.from_numpy(np.unique(generator.random_raw(128).astype(np.int64) % 700))


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("others", ["random", "equal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_that_holds_many_of_the_best(
    cpp: None, drawn: Tensor, dtype: torch.dtype, others: str, exclude_self: bool
) -> None:
    embeddings = random_table(700, 150) if others == "random" else random_table(1, 150).repeat(700, 1)
    embeddings[drawn[:25]] = random_table(1, 150, seed=1) + 0.5 * random_table(25, 150, seed=2)
    assert_exact(embeddings.to(dtype), 20, exclude_self)
    assert_exact(embeddings.to(dtype), 20, exclude_self, drawn[:31])


def test_a_first_floor_that_is_too_high_by_no_more_than_rounding(cpp: None, drawn: Tensor) -> None:
    """More candidates than asked for pass it in bf16, but not all of the best are among them."""
    others = torch.tensor(sorted({*range(700)} - {*drawn.tolist()}))
    query, apart = random_table(1, 150), random_table(700, 150, seed=1)
    apart -= (apart @ query.T) * query
    cosine = torch.zeros(700, 1)
    cosine[drawn[:35], 0] = torch.linspace(0.951, 0.95, 35)
    cosine[others[:300], 0] = torch.linspace(0.944, 0.938, 300)
    embeddings = cosine * query + (1 - cosine**2).sqrt() * torch.nn.functional.normalize(apart, dim=1)
    embeddings[others[-1]] = query
    assert_exact(embeddings, 60, True)


def test_queries_in_any_order_and_more_than_once(cpp: None) -> None:
    queries = torch.randint(300, (700,), generator=torch.Generator().manual_seed(4))
    for exclude_self in (True, False):
        assert_exact(random_table(300, 37), 9, exclude_self, queries)
    assert_exact(random_table(300, 37), 9, True, queries[:1].int())


def test_more_items_than_are_packed_at_a_time(cpp: None) -> None:
    embeddings = random_table(9000, 16)
    every = item_topk(embeddings, 5)
    queries = torch.tensor([8999, 0, 8191, 8192])
    some = item_topk(embeddings, 5, queries=queries)
    assert all(chosen.equal(rows[queries]) for rows, chosen in zip(every, some, strict=True))
    true = embeddings.double()[queries] @ embeddings.double().mT
    true.scatter_(1, queries[:, None], -torch.inf)
    assert some[0].equal(true.topk(5).indices)


@pytest.mark.parametrize("with_queries", [True, False])
def test_the_number_of_threads_changes_no_bit(cpp: None, with_queries: bool) -> None:
    embeddings = random_table(1500, 64)
    queries = torch.arange(0, 1500, 7) if with_queries else None
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(item_topk(embeddings, 20, queries=queries))
    finally:
        torch.set_num_threads(threads)
    for indices, scores in results[1:]:
        assert indices.equal(results[0][0])
        assert scores.view(torch.int32).equal(results[0][1].view(torch.int32))


def test_strided_embeddings_are_read_as_they_are(cpp: None) -> None:
    wide = random_table(100, 50)
    for ours, expected in zip(item_topk(wide[:, ::2], 4), item_topk(wide[:, ::2].clone(), 4), strict=True):
        assert ours.equal(expected)


def test_ctrl_c_stops_it_between_two_steps(cpp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self, **arguments: object) -> None:
            self.steps = 0

        def step(self) -> bool:
            self.steps += 1
            if self.steps == 3:
                signal.raise_signal(signal.SIGINT)
            assert self.steps < 100
            return True

    monkeypatch.setattr(ops, "extension", lambda: SimpleNamespace(ItemTopk=Interrupted))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            item_topk(torch.ones(4, 3), 2)
    finally:
        signal.signal(signal.SIGINT, before)


@both_backends
def test_chosen_queries_give_the_rows_of_all(backend: str) -> None:
    embeddings = torch.randint(-2, 3, (30, 7), generator=torch.Generator().manual_seed(2)).float()
    queries = torch.tensor([29, 3, 3, 0], dtype=torch.int32)
    every, some = item_topk(embeddings, 5), item_topk(embeddings, 5, queries=queries)
    for rows, chosen in zip(every, some, strict=True):
        assert chosen.equal(rows[queries.long()])


@both_backends
def test_equal_items_come_by_rising_index_and_never_contain_the_query(backend: str) -> None:
    indices, _ = item_topk(torch.ones(6, 3), 3)
    assert indices.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


@both_backends
@pytest.mark.parametrize(("items", "queries"), [(1, None), (0, None), (4, 0)], ids=str)
def test_nothing_to_find_is_no_error(backend: str, items: int, queries: int | None) -> None:
    ids = None if queries is None else torch.arange(queries)
    indices, scores = item_topk(torch.ones(items, 3), 2, queries=ids)
    assert indices.tolist() == [[-1, -1]] * (items if queries is None else queries)
    assert scores.eq(-torch.inf).all()


BAD = {
    "k below one": ({"k": 0}, "k: expected a whole number, at least 1 .*, got 0"),
    "integer embeddings": ({"embeddings": torch.ones(4, 3).int()}, r"embeddings: expected \(N, D\) float32"),
    "NaN": ({"embeddings": torch.full((4, 3), torch.nan)}, "embeddings: expected rows .* finite"),
    "infinity": ({"embeddings": torch.full((4, 3), -torch.inf)}, "embeddings: expected rows .* finite"),
    "overflow": ({"embeddings": torch.full((4, 3), 1e20)}, "embeddings: expected rows .* finite"),
    "floating queries": ({"queries": torch.ones(2)}, r"queries: expected \(Q,\) int32 or int64"),
    "unknown query": ({"queries": torch.tensor([0, 4])}, r"queries: .* in \[0, 4\), got 4"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        item_topk(**({"embeddings": torch.ones(4, 3), "k": 2} | change))


@both_backends
@pytest.mark.parametrize("queries", [None, torch.tensor([0, 8, 3])], ids=["every-item", "queries"])
def test_the_operator_keeps_its_contract(backend: str, queries: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.rellax.item_topk.default, (random_table(9, 5), queries, 4, True))


def test_it_compiles_without_a_graph_break() -> None:
    embeddings = random_table(9, 5)
    compiled = torch.compile(item_topk, fullgraph=True, backend="aot_eager")
    expected = item_topk(embeddings, 4)
    assert all(a.equal(b) for a, b in zip(compiled(embeddings, 4), expected, strict=True))
