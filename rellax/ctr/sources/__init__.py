"""Readers of raw rating data: a module per publisher, one for people's own, all handing out `Source`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rellax.ctr.sources.bookcrossing import read_bookcrossing
from rellax.ctr.sources.movielens import read_ml_1m, read_ml_25m, read_ml_100k
from rellax.ctr.sources.own import event_columns, read_own
from rellax.ctr.sources.source import Source

__all__ = [
    "READERS",
    "Source",
    "event_columns",
    "read_bookcrossing",
    "read_ml_1m",
    "read_ml_25m",
    "read_ml_100k",
    "read_own",
]

READERS: dict[str, Callable[[str | Path], Source]] = {
    "ml-100k": read_ml_100k,
    "ml-1m": read_ml_1m,
    "ml-25m": read_ml_25m,
    "bookcrossing": read_bookcrossing,
}
