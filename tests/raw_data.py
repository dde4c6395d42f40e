"""Small raw data in the format of MovieLens-100K, made for a test."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
USER = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
GENRES = ("Drama", "Comedy", "War", "Sci-Fi")

Interaction = tuple[int, int, int, int]  # user, item, rating, time


def write_ml_100k(folder: Path, interactions: Iterable[Interaction], users: int, items: int) -> Path:
    """Files with users 1 to `users`, items 1 to `items` and the given interactions; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    films = [f"{i}\tFilm {i}\t{1980 + i % 20}\t{GENRES[i % 4]}" for i in range(1, items + 1)]
    people = [f"{i}\t{15 + i % 50}\t{'MF'[i % 2]}\tother\t0000{i}" for i in range(1, users + 1)]
    rows = ["\t".join(map(str, row)) for row in interactions]
    for part, lines in (("inter", [INTER, *rows]), ("item", [ITEM, *films]), ("user", [USER, *people])):
        (folder / f"ml-100k.{part}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def random_interactions(users: int, items: int, per_user: int, seed: int) -> list[Interaction]:
    """Each user rates `per_user` distinct items, with many equal times, in no order.

    Users like one genre each: its films get 4 or 5, others 1 to 3.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(1, users + 1):
        liked = int(rng.integers(4))
        for item in rng.choice(np.arange(1, items + 1), size=per_user, replace=False):
            rating = rng.integers(4, 6) if item % 4 == liked else rng.integers(1, 4)
            rows.append((user, int(item), int(rating), 1000 + int(rng.integers(40 * per_user))))
    rng.shuffle(rows)
    return [tuple(int(value) for value in row) for row in rows]
