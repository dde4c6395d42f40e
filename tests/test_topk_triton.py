"""The Triton kernels of ``rellax::history_topk`` and ``rellax::item_topk``: blocks, passes, what they read.

Embeddings are multiples of 1/8 whose products are exact in fp32 in whatever order: the interpreter's products
are numpy's, which round equal rows differently by where they stand in a tile.
"""

from __future__ import annotations

import pytest
import torch
from test_history_topk import every_behaviour, histories, random_queries
from torch import Tensor

from rellax.kernels import _topk as kernels
from rellax.kernels import history_topk as history_kernels
from rellax.kernels import item_topk as item_kernels
from rellax.ops import history_topk
from rellax.reference import item_topk as reference
from rellax.testing.cases import device

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "triton")


def exact_table(items: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randint(-16, 17, (items, dim), generator=torch.Generator().manual_seed(seed))
    return (values / 8).to(device(), dtype)


def assert_as_reference(
    table: Tensor, items: Tensor, offsets: Tensor, k: int, queries: dict[str, Tensor]
) -> None:
    """Positions and scores, bit for bit; the operator's outputs begin as NaN and -1."""
    there = {name: index.to(table.device) for name, index in queries.items()}
    actual = history_topk(table, items.to(table.device), offsets.to(table.device), k, **there)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELLAX_BACKEND", "reference")
        expected = history_topk(table.cpu(), items, offsets, k, **queries)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.cpu().equal(theirs)


@pytest.mark.parametrize("dim", [1, 7, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_of_few_a_user_get_exactly_the_brute_force(dtype: torch.dtype, dim: int) -> None:
    items, offsets = histories([0, 1, 7, 0, 33, 70, 2], 40)
    assert_as_reference(exact_table(40, dim, dtype), items, offsets, 5, random_queries(offsets, 40, 60))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_behaviour_as_a_target_fills_large_blocks(dtype: torch.dtype) -> None:
    """Blocks of 64 queries, of which the last of a user has fewer, and three tiles of candidates."""
    items, offsets = histories([131, 0, 66], 90)
    queries = every_behaviour(items, offsets)
    table = exact_table(90, 9, dtype)
    assert history_kernels._blocks(len(items), 3, 3, table).BLOCK_Q == 64
    assert_as_reference(table, items, offsets, 3, queries)


@pytest.mark.parametrize("k", [40, 70, 130])
def test_many_results_are_kept_in_smaller_blocks_and_several_passes(k: int) -> None:
    items, offsets = histories([140], 30)
    queries = {"target": torch.tensor([3, 7]), "user": torch.tensor([0, 0]), "end": torch.tensor([135, 68])}
    assert_as_reference(exact_table(30, 3), items, offsets, k, queries)


def test_all_equal_scores_come_from_the_most_recent() -> None:
    items, offsets = torch.zeros(150, dtype=torch.int64), torch.tensor([0, 150])
    query = {"target": torch.tensor([0]), "user": torch.tensor([0]), "end": torch.tensor([149])}
    assert_as_reference(exact_table(1, 5), items, offsets, 33, query)


def test_zeros_of_both_signs_are_equal() -> None:
    table = torch.tensor([[1.0], [0.0], [-0.0]], device=device())
    items, offsets = torch.tensor([1, 2, 1, 2, 2, 1]), torch.tensor([0, 6])
    query = {"target": torch.tensor([0]), "user": torch.tensor([0]), "end": torch.tensor([6])}
    there = [x.to(device()) for x in (items, offsets)]
    positions, _ = history_topk(table, *there, 6, **{name: x.to(device()) for name, x in query.items()})
    assert positions.tolist() == [[5, 4, 3, 2, 1, 0]]


def test_scores_keep_their_order_as_keys() -> None:
    """Tiny, huge and negative scores; candidates that differ by one bit."""
    values = torch.tensor([1e-30, -1e-30, 3e38, -3e38, 1.0, 1.0 + 2**-23, -1.0, -1.0 - 2**-23, 0.0, 1e-35])
    table = torch.cat([torch.ones(1), values])[:, None].to(device())
    items, offsets = torch.arange(1, 11), torch.tensor([0, 10])
    query = {"target": torch.tensor([0]), "user": torch.tensor([0]), "end": torch.tensor([10])}
    assert_as_reference(table, items, offsets, 10, query)


@pytest.mark.parametrize("bad", [{"user": 2}, {"user": -1}, {"end": 4}, {"end": -1}, {"target": 5}], ids=str)
def test_a_query_that_makes_no_sense_has_nan_and_harms_no_other(bad: dict[str, int]) -> None:
    """On a GPU indices are not checked: nothing outside the tensors is read."""
    good = {"target": torch.tensor([1, 1]), "user": torch.tensor([0, 0]), "end": torch.tensor([3, 2])}
    table, items, offsets = exact_table(5, 4), torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 3, 5])
    odd = {name: torch.cat([x, torch.tensor([bad.get(name, 1)])]) for name, x in good.items()}
    arguments = [x.to(device()) for x in (table, items, offsets)]
    expected = history_kernels.history_topk(*arguments, *(x.to(device()) for x in good.values()), 2)
    positions, scores = history_kernels.history_topk(*arguments, *(x.to(device()) for x in odd.values()), 2)
    assert positions[:2].equal(expected[0])
    assert scores[:2].equal(expected[1])
    assert scores[2, 0].isnan()


def test_nothing_waits_for_the_device() -> None:
    """The launcher's own work: tensors without memory have no values to wait for."""
    new = {"dtype": torch.int64, "device": "meta"}
    index = [torch.empty(n, **new) for n in (40, 6, 100, 100, 100)]
    history_kernels._work(index[3], index[4], 5, 40, 16)


@pytest.mark.parametrize(("queries", "users"), [(8, 8), (4096, 8)])
def test_these_are_all_blocks_that_the_launcher_can_choose(queries: int, users: int) -> None:
    table = torch.empty(1, 1)
    reachable = {history_kernels._blocks(queries, users, k, table) for k in range(1, 2 * kernels.LIMIT)}
    assert reachable == {history_kernels._blocks(queries, users, k, table) for k in (30, 64, kernels.LIMIT)}


def assert_items_as_reference(
    table: Tensor, k: int, queries: Tensor | None = None, exclude_self: bool = True
) -> None:
    """Indices and scores, bit for bit."""
    ids = torch.arange(len(table)) if queries is None else queries
    actual = item_kernels.item_topk(table, ids.to(table.device), k, exclude_self)
    for ours, expected in zip(actual, reference.item_topk(table.cpu(), ids, k, exclude_self), strict=True):
        assert ours.cpu().equal(expected)


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("dim", [1, 7, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_items_get_exactly_the_brute_force(dtype: torch.dtype, dim: int, exclude_self: bool) -> None:
    queries = torch.tensor([0, 149, 7, 7, 80])
    assert_items_as_reference(exact_table(150, dim, dtype), 5, queries, exclude_self)


def test_every_item_as_a_query_fills_blocks() -> None:
    assert_items_as_reference(exact_table(131, 9), 3)


@pytest.mark.parametrize("k", [40, 70, 140])
def test_many_items_are_kept_in_smaller_blocks_and_several_passes(k: int) -> None:
    assert_items_as_reference(exact_table(135, 3), k, torch.tensor([0, 134]))


def test_equal_items_come_by_rising_index() -> None:
    assert_items_as_reference(exact_table(1, 5).repeat(140, 1), 33, torch.tensor([0, 20, 139]))


@pytest.mark.parametrize("query", [-1, 4])
def test_an_item_that_does_not_exist_has_nan(query: int) -> None:
    queries = torch.tensor([0, query], device=device())
    _, scores = item_kernels.item_topk(exact_table(4, 3), queries, 2, True)
    assert scores[:, 0].isnan().tolist() == [False, True]


def searched_again(monkeypatch: pytest.MonkeyPatch, table: Tensor, k: int) -> int:
    """How many rows a second search takes; the result is checked too."""
    counts = []
    search = item_kernels._search

    def counted(rows: Tensor, queries: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        counts.append(len(queries) if rows.dtype == torch.float32 else 0)
        return search(rows, queries, *arguments)

    monkeypatch.setattr(item_kernels, "_search", counted)
    assert_items_as_reference(table, k, torch.tensor([0, 5, 99]))
    return sum(counts)


def test_rows_that_fp16_settles_are_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert searched_again(monkeypatch, exact_table(150, 30), 5) == 0


def test_rows_that_fp16_cannot_settle_are_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items so close to one another that fp16 rounds them to the same number."""
    noise = torch.randint(-100, 101, (150, 1), generator=torch.Generator().manual_seed(3))
    table = (1 + noise * 2.0**-20).to(device())
    table[[0, 5, 99]] = 1.0
    assert searched_again(monkeypatch, table, 5) == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30], ids=str)
def test_an_item_score_that_is_not_finite_shows(value: float) -> None:
    table = exact_table(100, 3)
    table[70] = value
    queries = torch.tensor([0, 70], device=device())
    _, scores = item_kernels.item_topk(table, queries, 2, False)
    assert scores[1, 0].isnan()
    assert scores[0, 0].isnan() == (value != 1e30)


def test_the_error_of_the_halves_is_not_underestimated() -> None:
    table = torch.randn(60, 33, generator=torch.Generator().manual_seed(4)) * 1e-3
    halves, unit, error = item_kernels._halves(table)
    true = (table.double() @ table.double().T) * unit.double()
    assert ((halves.double() @ halves.double().T - true).abs() <= error[:, None]).all()
    assert error.max() < 0.1 * true.diagonal().max()
