"""history_topk against a brute force in numpy (fp64), on both backends a CPU has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rellax.errors import InputError
from rellax.ops import history_topk
from rellax.ops._register import extension_built

BACKENDS = ["reference", "cpp"]
LENGTHS = [0, 1, 7, 0, 33, 129, 2]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RELLAX_BACKEND", request.param)
    return request.param


def histories(lengths: list[int], items: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random items of every user's history, and the offsets."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randint(items, (int(offsets[-1]),), generator=generator), offsets


def random_queries(offsets: Tensor, items: int, count: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(len(offsets) - 1, (count,), generator=generator)
    end = (torch.rand(count, generator=generator) * (offsets.diff()[user] + 1)).long()
    return {"target": torch.randint(items, (count,), generator=generator), "user": user, "end": end}


def every_behaviour(items: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    user = torch.cat([torch.full((int(n),), u) for u, n in enumerate(offsets.diff())])
    return {"target": items, "user": user, "end": torch.arange(len(items)) - offsets[user]}


def candidates(items: Tensor, offsets: Tensor, user: int, end: int) -> np.ndarray:
    return items[offsets[user] : offsets[user] + end].numpy()


def best_first(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions by falling score, equal ones by falling position; -1 past the last."""
    order = np.lexsort((-np.arange(len(scores)), -scores))[:k]
    return np.concatenate([order, np.full(k - len(order), -1)])


def assert_exact(
    embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, queries: dict[str, Tensor]
) -> None:
    """For embeddings whose products are exact in fp32: ids and scores equal the brute force."""
    positions, scores = history_topk(embeddings, items, offsets, k, **queries)
    table = embeddings.double().numpy()
    for q, (target, user, end) in enumerate(zip(*(queries[n].tolist() for n in queries), strict=True)):
        true = table[candidates(items, offsets, user, end)] @ table[target]
        expected = best_first(true, k)
        assert positions[q].tolist() == expected.tolist()
        found = expected[expected >= 0]
        assert scores[q].tolist() == [*true[found], *[-np.inf] * (k - len(found))]


def assert_best(
    embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, queries: dict[str, Tensor]
) -> None:
    """For any embeddings: scores are right to fp32 rounding, nothing better by more than that is left out."""
    positions, scores = history_topk(embeddings, items, offsets, k, **queries)
    table = embeddings.double().numpy()
    unit = (embeddings.shape[1] + 1) * 2.0**-24
    for q, (target, user, end) in enumerate(zip(*(queries[n].tolist() for n in queries), strict=True)):
        rows = table[candidates(items, offsets, user, end)]
        true, rounding = rows @ table[target], unit * (np.abs(rows) @ np.abs(table[target]))
        count = min(k, end)
        found, rest = positions[q, :count].numpy(), positions[q, count:]
        assert len(set(found.tolist())) == count
        assert rest.eq(-1).all()
        assert scores[q, count:].eq(-torch.inf).all()
        assert scores[q, :count].diff().le(0).all()
        assert (np.abs(scores[q, :count].numpy() - true[found]) <= rounding[found]).all()
        left_out = np.setdiff1d(np.arange(end), found)
        if len(left_out):
            worst_kept = (true[found] + rounding[found]).min()
            assert (true[left_out] - rounding[left_out]).max() <= worst_kept


@pytest.mark.parametrize("k", [1, 5, 30, 200])
@pytest.mark.parametrize("dim", [1, 7, 16, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integer_embeddings_give_exactly_the_brute_force(
    backend: str, dtype: torch.dtype, dim: int, k: int
) -> None:
    embeddings = torch.randint(-3, 4, (40, dim), generator=torch.Generator().manual_seed(2)).to(dtype)
    items, offsets = histories(LENGTHS, 40)
    assert_exact(embeddings, items, offsets, k, random_queries(offsets, 40, 60))


@pytest.mark.parametrize("dim", [5, 129, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_embeddings_give_the_best_to_rounding(backend: str, dtype: torch.dtype, dim: int) -> None:
    embeddings = torch.randn(300, dim, generator=torch.Generator().manual_seed(3))
    embeddings = torch.nn.functional.normalize(embeddings, dim=1).to(dtype)
    items, offsets = histories(LENGTHS, 300)
    assert_best(embeddings, items, offsets, 9, random_queries(offsets, 300, 60))


def test_without_queries_every_behaviour_is_a_target(backend: str) -> None:
    embeddings = torch.randint(-3, 4, (40, 16), generator=torch.Generator().manual_seed(4)).float()
    items, offsets = histories(LENGTHS, 40)
    queries = every_behaviour(items, offsets)
    for ours, expected in zip(
        history_topk(embeddings, items, offsets, 6),
        history_topk(embeddings, items, offsets, 6, **queries),
        strict=True,
    ):
        assert ours.equal(expected)
    assert_exact(embeddings, items, offsets, 6, queries)


def test_equal_scores_put_the_more_recent_behaviour_first(backend: str) -> None:
    positions, scores = history_topk(
        torch.ones(3, 20),
        torch.tensor([0, 1, 2, 0, 1, 2, 0]),
        torch.tensor([0, 7]),
        4,
        target=torch.tensor([1]),
        user=torch.tensor([0]),
        end=torch.tensor([6]),
    )
    assert positions.tolist() == [[5, 4, 3, 2]]
    assert scores.tolist() == [[20.0] * 4]


def test_an_item_that_occurs_again_ties_with_itself(backend: str) -> None:
    embeddings = torch.randn(5, 131, generator=torch.Generator().manual_seed(5))
    items = torch.arange(5).repeat(13)
    positions, scores = history_topk(
        embeddings,
        items,
        torch.tensor([0, 65]),
        65,
        target=torch.tensor([2]),
        user=torch.tensor([0]),
        end=torch.tensor([65]),
    )
    by_item = positions.view(5, 13)
    assert items[by_item].eq(items[by_item[:, :1]]).all()
    assert by_item.diff(dim=1).eq(-5).all()
    assert scores.view(5, 13).diff(dim=1).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_16_bit_value_is_read_exactly(backend: str, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    embeddings = torch.cat([torch.ones(1, dtype=dtype), values])[:, None]
    items, offsets = torch.arange(1, len(embeddings)), torch.tensor([0, len(values)])
    query = {"target": torch.tensor([0]), "user": torch.tensor([0]), "end": torch.tensor([len(values)])}
    positions, scores = history_topk(embeddings, items, offsets, len(values), **query)
    assert positions[0].sort().values.equal(torch.arange(len(values)))
    assert scores[0].equal(values[positions[0]].float())
    assert scores[0].diff().le(0).all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_no_behaviour_at_all_gives_no_query(backend: str, lengths: list[int]) -> None:
    items, offsets = histories(lengths, 3)
    positions, scores = history_topk(torch.randn(3, 4), items, offsets, 2)
    assert positions.shape == scores.shape == (0, 2)
    assert positions.dtype == torch.int64
    assert scores.dtype == torch.float32


def test_a_query_without_candidates_gets_nothing(backend: str) -> None:
    query = {"target": torch.tensor([0, 1]), "user": torch.tensor([0, 1]), "end": torch.tensor([0, 0])}
    positions, scores = history_topk(
        torch.randn(3, 4), torch.tensor([1]), torch.tensor([0, 0, 1]), 2, **query
    )
    assert positions.tolist() == [[-1, -1]] * 2
    assert scores.eq(-torch.inf).all()


def test_strided_and_int32_input_is_read_as_it_is(backend: str) -> None:
    wide = torch.randint(-3, 4, (40, 50), generator=torch.Generator().manual_seed(6)).float()
    items, offsets = histories(LENGTHS, 40)
    queries = random_queries(offsets, 40, 30)
    expected = history_topk(wide[:, :19].contiguous(), items, offsets, 3, **queries)
    doubled = {name: index.repeat_interleave(2).int()[::2] for name, index in queries.items()}
    found = history_topk(wide[:, :19], items.int(), offsets.int(), 3, **doubled)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("every", [True, False], ids=["every behaviour", "random queries"])
@pytest.mark.parametrize("count", [900, 60], ids=["rare targets", "frequent targets"])
def test_the_number_of_threads_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, count: int, every: bool
) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    embeddings = torch.randn(count, 200, generator=torch.Generator().manual_seed(7))
    items, offsets = histories([300, 5, 801, 0, 400], count)
    queries = {} if every else random_queries(offsets, count, 1_000)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            results.append(history_topk(embeddings, items, offsets, 30, **queries))
    finally:
        torch.set_num_threads(threads)
    for positions, scores in results[1:]:
        assert positions.equal(results[0][0])
        assert scores.view(torch.int32).equal(results[0][1].view(torch.int32))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_score_that_is_not_finite_is_an_error_wherever_it_ranks(
    backend: str, dtype: torch.dtype, value: float
) -> None:
    embeddings = torch.ones(4, 3)
    embeddings[1], embeddings[2] = value, -value
    embeddings = embeddings.to(dtype)
    items, offsets = torch.tensor([0, 0, 0, 2, 0]), torch.tensor([0, 5])
    query = {"target": torch.tensor([3, 1]), "user": torch.tensor([0, 0]), "end": torch.tensor([3, 5])}
    with pytest.raises(InputError, match=r"embeddings: expected rows whose dot products.* in query 1"):
        history_topk(embeddings, items, offsets, 2, **query)


def test_rows_that_no_query_reads_are_not_looked_at(backend: str) -> None:
    embeddings = torch.ones(3, 3)
    embeddings[2] = torch.nan
    items, offsets = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 4])
    query = {"target": torch.tensor([1]), "user": torch.tensor([0]), "end": torch.tensor([3])}
    assert history_topk(embeddings, items, offsets, 2, **query)[0].tolist() == [[2, 1]]


def lane_scores(target: Tensor, rows: Tensor) -> Tensor:
    """The documented order of the C++ kernel's sums: 16 interleaved lanes, added up as a binary tree."""
    products = F.pad(rows.float() * target.float(), (0, -rows.shape[1] % 16)).unflatten(1, (-1, 16))
    lanes = torch.zeros(len(rows), 16)
    for step in products.unbind(1):
        lanes = lanes + step
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes[:, 0]


def unit_rows(items: int, dim: int) -> Tensor:
    rows = torch.randn(items, dim, generator=torch.Generator().manual_seed(8))
    return F.normalize(rows, dim=1)


def neighbours_by_one_ulp(items: int, dim: int) -> Tensor:
    """Rows that bf16 can't tell apart: one row, and in each an element that is one fp32 ulp away."""
    rows = unit_rows(1, dim).repeat(items, 1)
    place = torch.arange(items)
    rows[place, place % dim] = torch.nextafter(rows[place, place % dim], torch.tensor(torch.inf))
    return rows


EMBEDDINGS = {
    "unit": unit_rows,
    "one ulp apart": neighbours_by_one_ulp,
    "all equal": lambda items, dim: unit_rows(1, dim).repeat(items, 1),
    "in pairs": lambda items, dim: unit_rows((items + 1) // 2, dim).repeat(2, 1)[:items],
    "zero": torch.zeros,
    "tiny": lambda items, dim: unit_rows(items, dim) * 1e-21,
    "of all sizes": lambda items, dim: unit_rows(items, dim) * torch.logspace(-6, 3, items)[:, None],
}
REGIMES = {  # items, dim, lengths, random queries or None for every behaviour, k
    "short histories": (900, 70, [0, 1, 31, 32, 33, 127, 128], None, 30),
    "product": (900, 513, [129, 31, 257, 301], None, 3),
    "product, some with fewer than k": (900, 33, [450, 430], 300, 5),
    "product, several strips": (900, 7, [1100, 2070], 300, 30),
    "product, largest k": (9000, 7, [9000], 220, 512),
    "heap": (900, 7, [1100], 40, 513),
    "product, several blocks": (2000, 4097, [1200], 60, 5),
    "not worth packing, k past histories": (900, 33, [129, 150], None, 200),
    "not worth packing, several strips": (900, 65, [1100, 2070], 30, 30),
    "sketch": (700, 65, [129, *[1100] * 20], 24, 30),
    "sketch, largest k": (700, 65, [1100] * 20, 24, 256),
    "no sketch, the next k": (700, 65, [1100] * 20, 24, 257),
    "few queries without a sketch": (900, 65, [140, 1030], 5, 30),
    "rows of all targets": (40, 65, [129, 1030, 20], None, 30),
    "rows of some targets": (300, 65, [129, 20, 330], None, 30),
    "row of one item": (1, 16, [40], None, 30),
    "rows of queries in any order": (40, 65, [300, 0, 130], 300, 30),
    "rows, largest k": (40, 7, [1030], None, 512),
    "no rows, the next k": (40, 7, [1030], None, 513),
}


def assert_bits(embeddings: Tensor, items: Tensor, offsets: Tensor, k: int, asked: dict[str, Tensor]) -> None:
    """Some sixty of the queries, or of all behaviours, get the bits of a brute force."""
    positions, scores = history_topk(embeddings, items, offsets, k, **asked)
    asked = asked or every_behaviour(items, offsets)
    for q in range(0, len(positions), max(len(positions) // 60, 1)):
        target, user, end = (int(asked[name][q]) for name in asked)
        rows = embeddings[items[offsets[user] : offsets[user] + end]]
        expected = lane_scores(embeddings[target], rows)
        best = best_first(expected.numpy(), k)
        assert positions[q].tolist() == best.tolist()
        assert scores[q, : min(k, end)].equal(expected[best[: min(k, end)]])


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_gives_the_bits_of_a_brute_force(
    monkeypatch: pytest.MonkeyPatch, regime: str, kind: str
) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    count, dim, lengths, queries, k = REGIMES[regime]
    if kind not in ("unit", "one ulp apart", "all equal") and dim > 600:
        pytest.skip("slow, and no other path than in smaller dimensions")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        embeddings = EMBEDDINGS[kind](count, dim).to(dtype)
        items, offsets = histories(lengths, count)
        asked = {} if queries is None else random_queries(offsets, count, queries)
        assert_bits(embeddings, items, offsets, k, asked)


def of_one_user(history: Tensor, target: Tensor, end: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    queries = {"target": target, "user": torch.zeros_like(target), "end": torch.full_like(target, end)}
    return history, torch.tensor([0, len(history)]), queries


def test_products_that_are_off_by_all_that_the_bound_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the elements of the best three rows are rounded down, and of five others up, by half a step."""
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(64, (64,), generator=generator)
    rows = torch.stack([steps[torch.randperm(64, generator=generator)] for _ in range(700)]).float()
    rows[:3] += 0.49
    rows[3:8] += 0.51
    rows[3:8, 0] -= 2
    rows[8:] -= 2
    targets = (1 + torch.arange(300) / 128)[:, None].expand(-1, 64)
    items, offsets, asked = of_one_user(torch.arange(700), torch.arange(700, 1000), 700)
    assert_bits(torch.cat([1 + rows / 128, targets]), items, offsets, 5, asked)


def test_a_product_whose_targets_alone_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the best three rows lose more than half a percent of their scores, and five others nothing."""
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    half = torch.arange(64) < 32
    rows = (~half).expand(700, -1).float()
    rows[:3] = 1 - rows[:3]
    rows[3:8, -1] += 1 / 16
    rows[8:, -1] -= 1 / 16
    targets = (1 + 0.49 / 128 * half).expand(300, -1)
    items, offsets, asked = of_one_user(torch.arange(700), torch.arange(700, 1000), 700)
    assert_bits(torch.cat([rows, targets]), items, offsets, 5, asked)


@pytest.mark.parametrize("rounded", ["rows", "targets"])
def test_sketches_that_are_off_by_all_that_the_bound_allows(
    monkeypatch: pytest.MonkeyPatch, rounded: str
) -> None:
    """The sketch, or the target's, takes half a step from the best of 1,100 rows; the last are zeros."""
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randint(2, (1100, 64), generator=generator).float()
    best, next_best, targets = embeddings[:3], embeddings[3:8], embeddings[8:28]
    if rounded == "rows":  # steps of 1, from 127 down
        steps = torch.randint(64, (63,), generator=generator)
        for row in embeddings[:8]:
            row[0], row[1:] = 127, steps[torch.randperm(63, generator=generator)]
        best[:, 1:] += 0.49
        next_best[:, 1:] += 0.51
        next_best[:, 1] -= 10
        targets[:] = 1
    else:  # of 127 / 32,767: 63 lies between two; the next best score 1952.97, and the best 1953
        embeddings[:720] = 0
        targets[:, :31], targets[:, 32:48], targets[:, 48:] = 63, 127, 2
        best[:, :31] = 1
        others = torch.cat([embeddings[3:8], embeddings[28:720]])
        others[:, 32:39], others[:, 39], others[:, 48:52] = 127 / 64, 87 / 64, 127 / 64
        others[:5, 52], others[5:, 52] = 11 / 64, 5 / 64
        embeddings[3:8], embeddings[28:720] = others[:5], others[5:]
    embeddings[1024:] = 0
    history = torch.cat([torch.arange(8), torch.arange(28, 720)])
    offsets = len(history) * torch.arange(21)
    asked = {"target": 8 + torch.arange(20), "user": torch.arange(20), "end": torch.full((20,), len(history))}
    assert_bits(embeddings, history.repeat(20), offsets, 5, asked)


def test_the_best_candidates_in_a_last_strip_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    embeddings = unit_rows(900, 65).abs()
    embeddings[:3] *= 10
    history = torch.cat([3 + torch.arange(1024) % 897, torch.arange(3)])
    for queries in (6, 300):  # direct, product
        items, offsets, asked = of_one_user(history, torch.arange(300, 300 + queries), 1027)
        assert_bits(embeddings, items, offsets, 30, asked)


def test_a_sketch_of_huge_rows_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    rows = unit_rows(720, 65)
    large, small = rows[:700] * 2.0**60, rows[700:] * 2.0**-80
    items, offsets = histories([600] * 20, 700)
    queries = {"target": torch.arange(700, 720), "user": torch.arange(20), "end": torch.full((20,), 600)}
    positions, scores = history_topk(torch.cat([large, small]), items, offsets, 30, **queries)
    expected, expected_scores = history_topk(rows, items, offsets, 30, **queries)
    assert positions.equal(expected)
    assert scores.equal(expected_scores * 2.0**-20)


def test_rows_of_a_large_table_are_made_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    count = 1 << 20  # of which 16 rows have room at once
    embeddings = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    items, offsets = histories([9000, 4000], 20)
    items *= 50_000
    every = every_behaviour(items, offsets)
    candidates_of = torch.zeros(count, dtype=torch.long).index_add(0, items, every["end"])
    assert (candidates_of >= 2 * count).sum() > 16
    chosen = torch.arange(0, len(items), 97)
    expected = history_topk(embeddings, items, offsets, 3, **{name: of[chosen] for name, of in every.items()})
    found = history_topk(embeddings, items, offsets, 3)
    assert [a[chosen].equal(b) for a, b in zip(found, expected, strict=True)] == [True, True]


def test_many_queries_of_frequent_targets_are_sorted_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    embeddings = unit_rows(7, 3)
    items, offsets = histories([400] * 25_000, 7)  # 10 M queries, 8.4 M have room at once
    positions, scores = history_topk(embeddings, items, offsets, 2)
    asked = {name: of[::4_999] for name, of in every_behaviour(items, offsets).items()}
    expected = history_topk(embeddings, items, offsets, 2, **asked)
    assert [a[::4_999].equal(b) for a, b in zip((positions, scores), expected, strict=True)] == [True, True]


@pytest.mark.parametrize("regime", REGIMES)
def test_in_every_regime_rows_without_an_element_tie(backend: str, regime: str) -> None:
    count, _, lengths, queries, k = REGIMES[regime]
    items, offsets = histories(lengths, count)
    asked = every_behaviour(items, offsets) if queries is None else random_queries(offsets, count, queries)
    assert_exact(torch.zeros(count, 0), items, offsets, k, asked)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_every_regime_finds_a_score_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, regime: str, value: float
) -> None:
    monkeypatch.setenv("RELLAX_BACKEND", "cpp")
    count, dim, lengths, queries, k = REGIMES[regime]
    embeddings = unit_rows(count, dim)
    items, offsets = histories(lengths, count)
    asked = {} if queries is None else random_queries(offsets, count, queries)
    user = int(offsets.diff().argmax() if queries is None else asked["user"][asked["end"].argmax()])
    history_topk(embeddings, items, offsets, k, **asked)
    embeddings[items[offsets[user]]] = value
    with pytest.raises(InputError, match="dot products are finite in fp32"):
        history_topk(embeddings, items, offsets, k, **asked)


GOOD = {
    "embeddings": torch.ones(4, 3),
    "items": torch.tensor([0, 1, 2, 3, 0]),
    "offsets": torch.tensor([0, 2, 5]),
    "k": 2,
    "target": torch.tensor([0, 3]),
    "user": torch.tensor([0, 1]),
    "end": torch.tensor([2, 3]),
}
BAD = {
    "k below one": ({"k": 0}, "k: expected a whole number, at least 1 .*, got 0"),
    "one-dimensional embeddings": ({"embeddings": torch.ones(4)}, r"embeddings: expected \(N, D\)"),
    "fp64 embeddings": ({"embeddings": torch.ones(4, 3).double()}, "embeddings: .* got .* float64"),
    "floating items": ({"items": torch.ones(5)}, r"items: expected \(M,\) int32 or int64"),
    "item past the table": ({"items": torch.tensor([0, 1, 4, 3, 0])}, r"items: .* in \[0, 4\), got 4"),
    "negative item": ({"items": torch.tensor([0, -1, 2, 3, 0])}, r"items: .* in \[0, 4\), got -1"),
    "offsets that fall": ({"offsets": torch.tensor([0, 3, 2, 5])}, "offsets: .* rise .* falling 1 times"),
    "offsets from one": ({"offsets": torch.tensor([1, 2, 5])}, "offsets: .* rise from 0 .* got 1 to 5"),
    "offsets that end early": (
        {"offsets": torch.tensor([0, 2, 4])},
        "offsets: .* to the M = 5 .* got 0 to 4",
    ),
    "no offsets": ({"offsets": torch.tensor([], dtype=torch.int64)}, r"offsets: .* at least \(1,\)"),
    "target past the table": ({"target": torch.tensor([0, 4])}, r"target: .* in \[0, 4\), got 4"),
    "unknown user": ({"user": torch.tensor([0, 2])}, r"user: .* in \[0, 2\), got 2"),
    "end past the history": (
        {"end": torch.tensor([3, 3])},
        "end: .* 2 behaviours of user 0, got 3 for",
    ),
    "negative end": ({"end": torch.tensor([2, -1])}, "end: .* 3 behaviours of user 1, got -1 for"),
    "no end": ({"end": None}, "target, user, end: expected all three or none, got only target and user"),
    "fewer users than targets": ({"user": torch.tensor([0])}, "user: .* Q = 2 targets"),
    "another device": ({"items": torch.zeros(5, device="meta").long()}, "items: .* on cpu, got .* on meta"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_sentence(change: dict[str, object], message: str) -> None:
    history_topk(**GOOD)
    with pytest.raises(InputError, match=message):
        history_topk(**(GOOD | change))


def test_offsets_are_checked_where_every_behaviour_is_a_target() -> None:
    with pytest.raises(InputError, match="offsets: "):
        history_topk(GOOD["embeddings"], GOOD["items"], torch.tensor([0, 3, 2, 5]), 2)


def test_the_operator_keeps_its_contract(backend: str) -> None:
    k = GOOD["k"]
    tensors = [GOOD[name] for name in ("embeddings", "items", "offsets", "target", "user", "end")]
    torch.library.opcheck(torch.ops.rellax.history_topk.default, (*tensors, k))


@pytest.mark.parametrize("with_queries", [True, False])
def test_it_compiles_without_a_graph_break(with_queries: bool) -> None:
    arguments = GOOD if with_queries else {n: GOOD[n] for n in ("embeddings", "items", "offsets", "k")}
    compiled = torch.compile(history_topk, fullgraph=True, backend="aot_eager")
    expected = history_topk(**arguments)
    assert all(a.equal(b) for a, b in zip(compiled(**arguments), expected, strict=True))


def test_no_gradient_is_taken() -> None:
    _, scores = history_topk(**(GOOD | {"embeddings": torch.ones(4, 3, requires_grad=True)}))
    assert not scores.requires_grad


def test_the_extension_is_built() -> None:
    assert extension_built()


def test_no_queries_are_none_and_not_every_behaviour(backend: str) -> None:
    items, offsets = histories([170], 5)
    positions, scores = history_topk(torch.ones(5, 3), items, offsets, 2, **random_queries(offsets, 5, 0))
    assert positions.shape == scores.shape == (0, 2)
