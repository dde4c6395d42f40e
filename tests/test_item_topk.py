"""item_topk against a brute force in numpy (fp64)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import item_topk
from rellax.reference import item_topk as reference


def random_table(items: int, dim: int, seed: int = 0) -> Tensor:
    table = torch.randn(items, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(table, dim=1)


def expected_order(scores: np.ndarray, query: int, k: int, exclude_self: bool) -> list[int]:
    """Indices by falling score, equal ones by rising index; -1 past the last."""
    order = np.lexsort((np.arange(len(scores)), -scores)).tolist()
    if exclude_self:
        order.remove(query)
    return [*order[:k], *[-1] * (k - len(order))]


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("k", [1, 7, 40, 55])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integer_embeddings_give_exactly_the_brute_force(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, k: int, exclude_self: bool
) -> None:
    monkeypatch.setattr(reference, "_BLOCK_SCORES", 3 * 40)  # blocks of three queries, the last one of one
    embeddings = torch.randint(-2, 3, (40, 7), generator=torch.Generator().manual_seed(1)).to(dtype)
    true = embeddings.double().numpy() @ embeddings.double().numpy().T
    indices, scores = item_topk(embeddings, k, exclude_self=exclude_self)
    for q in range(40):
        expected = expected_order(true[q], q, k, exclude_self)
        assert indices[q].tolist() == expected
        assert scores[q].tolist() == [true[q, j] if j >= 0 else -np.inf for j in expected]


def test_random_embeddings_give_the_best_to_rounding() -> None:
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


def test_chosen_queries_give_the_rows_of_all() -> None:
    embeddings = torch.randint(-2, 3, (30, 7), generator=torch.Generator().manual_seed(2)).float()
    queries = torch.tensor([29, 3, 3, 0], dtype=torch.int32)
    every, some = item_topk(embeddings, 5), item_topk(embeddings, 5, queries=queries)
    for rows, chosen in zip(every, some, strict=True):
        assert chosen.equal(rows[queries.long()])


def test_equal_items_come_by_rising_index_and_never_contain_the_query() -> None:
    indices, _ = item_topk(torch.ones(6, 3), 3)
    assert indices.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(("items", "queries"), [(1, None), (0, None), (4, 0)], ids=str)
def test_nothing_to_find_is_no_error(items: int, queries: int | None) -> None:
    ids = None if queries is None else torch.arange(queries)
    indices, scores = item_topk(torch.ones(items, 3), 2, queries=ids)
    assert indices.tolist() == [[-1, -1]] * (items if queries is None else queries)
    assert scores.eq(-torch.inf).all()


BAD = {
    "k below one": ({"k": 0}, "k: expected at least 1, got 0"),
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


def test_the_operator_keeps_its_contract() -> None:
    arguments = (random_table(9, 5), torch.tensor([0, 8, 3]), 4, True)
    torch.library.opcheck(torch.ops.rellax.item_topk.default, arguments)


def test_it_compiles_without_a_graph_break() -> None:
    embeddings = random_table(9, 5)
    compiled = torch.compile(item_topk, fullgraph=True, backend="aot_eager")
    expected = item_topk(embeddings, 4)
    assert all(a.equal(b) for a, b in zip(compiled(embeddings, 4), expected, strict=True))
