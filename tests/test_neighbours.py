"""item_neighbours: exact, and through faiss with the recall measured."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import item_topk
from rellax.subr import item_neighbours, neighbours


def random_table(items: int, dim: int) -> Tensor:
    table = torch.randn(items, dim, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(table, dim=1)


def test_exact_is_item_topk() -> None:
    table = random_table(50, 9)
    found = item_neighbours(table, 4)
    assert all(a.equal(b) for a, b in zip((found.indices, found.scores), item_topk(table, 4), strict=True))
    assert found.recall is found.sample is None


@pytest.mark.parametrize("method", ["faiss-hnsw", "faiss-ivf"])
def test_faiss_finds_what_there_is_and_reports_its_recall(method: str) -> None:
    pytest.importorskip("faiss")
    table = random_table(600, 16)
    exact, scores = item_topk(table, 5)
    found = item_neighbours(table, 5, method=method, effort=600)  # every list, or most of the graph
    assert found.indices.shape == found.scores.shape == (600, 5)
    assert found.sample == 600
    hits = (exact[:, :, None] == found.indices[:, None, :]).any(2)
    assert found.recall == pytest.approx(hits.double().mean().item())
    assert found.recall > 0.99
    assert not (found.indices == torch.arange(600)[:, None]).any()
    torch.testing.assert_close(found.scores[hits.all(1)], scores[hits.all(1)])


@pytest.mark.parametrize("method", ["faiss-hnsw", "faiss-ivf"])
def test_how_many_queries_faiss_gets_at_once_changes_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block is smaller, and an item of any block is no neighbour of its own."""
    pytest.importorskip("faiss")
    table = random_table(600, 16)
    whole = item_neighbours(table, 5, method=method, effort=600)
    monkeypatch.setattr(neighbours, "_BLOCK", 250)
    blocks = item_neighbours(table, 5, method=method, effort=600)
    assert blocks.indices.equal(whole.indices)
    torch.testing.assert_close(blocks.scores, whole.scores)
    assert blocks.recall == whole.recall


def test_less_effort_costs_recall_which_is_measured_on_the_sample() -> None:
    pytest.importorskip("faiss")
    table = random_table(600, 16)
    little, much = (item_neighbours(table, 5, method="faiss-ivf", effort=n, sample=100) for n in (1, 15))
    assert little.sample == much.sample == 100
    assert little.recall is not None
    assert much.recall is not None
    assert little.recall < much.recall == 1.0


@pytest.mark.parametrize(("k", "graph"), [(5, 64), (30, 120)])
def test_effort_grows_with_k_and_the_number_of_lists(
    k: int, graph: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    made: list[Any] = []
    original = neighbours._index
    monkeypatch.setattr(neighbours, "_index", lambda *a: made.append(original(*a)) or made[-1])
    for method in ("faiss-hnsw", "faiss-ivf"):
        item_neighbours(random_table(1500, 4), k, method=method, sample=10)
    assert made[0].hnsw.efSearch == graph
    assert made[1].nprobe == made[1].nlist // 16 == 2


@pytest.mark.parametrize("method", ["faiss-hnsw", "faiss-ivf"])
def test_fewer_items_than_k(method: str) -> None:
    pytest.importorskip("faiss")
    found = item_neighbours(random_table(3, 4), 5, method=method)
    assert found.indices[:, 2:].eq(-1).all()
    assert found.scores[:, 2:].eq(-torch.inf).all()
    assert found.recall == 1.0


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r'method: .*"rellax\[faiss\]".* got \'faiss-ivf\''):
        item_neighbours(torch.ones(3, 2), 1, method="faiss-ivf")


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(InputError, match="method: expected one of exact, faiss-hnsw, faiss-ivf, got 'lsh'"):
        item_neighbours(torch.ones(3, 2), 1, method="lsh")
    pytest.importorskip("faiss")
    with pytest.raises(InputError, match=r"k: expected a whole number, at least 1 .*, got 0"):
        item_neighbours(torch.ones(3, 2), 0, method="faiss-ivf")
