"""What every reader hands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from rellax.ctr.sources.tables import is_parquet


@dataclass(frozen=True)
class Source:
    """Raw rating data in the one shape `prepare` takes.

    Attributes:
        name: of the data set.
        item_noun: what an item is called in a prompt.
        items: strings `item_id`, `title`, `text` (what is embedded: title, year, genres) and item features.
        users: strings `user_id`, `profile` (a phrase for the prompt, "" where nothing is known) and user
            features.
        interactions: `user_id`, `item_id` strings (or dictionaries of them), `rating` float32, and `time`
            int64, which is left out where there are no times; in file order.
        item_features, user_features: categorical columns for the classical model.
        rating_scale: lowest and highest rating.
        positive_above: the label is 1 where the rating is larger than this.
        interactions_files: how many rows of `interactions` came from which file, for error messages.
        first_line: the line of a file's first row, but for Parquet.
        files: all files that were read.
        rows: how many rows each table has, by the name of its file.
        odd: how often something irregular was met and mended, by description.
        dropped: how many rows the reader left out, by reason.
        unrated: the rating that stands for an interaction without one, off the scale and labelled 0.
        answers: what ratings 0 and 1 are called in a prompt, where they are labels.
        question: the prompt's question, where the usual one does not fit.
        dates: times were dates, and are milliseconds since 1970.
        drop_unknown: interactions with an id in no table are left out, and counted; else they are an error.
    """

    name: str
    item_noun: str
    items: pa.Table
    users: pa.Table
    interactions: pa.Table
    item_features: tuple[str, ...]
    user_features: tuple[str, ...]
    rating_scale: tuple[float, float]
    positive_above: float
    interactions_files: Mapping[Path, int]
    first_line: int
    files: tuple[Path, ...]
    rows: dict[str, int]
    odd: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    unrated: float | None = None
    answers: tuple[str, str] | None = None
    question: str | None = None
    drop_unknown: bool = False
    dates: bool = False

    def line(self, row: int) -> str:
        """File and line of an interaction, or row where the file has no lines."""
        files = iter(self.interactions_files.items())
        path, rows = next(files)
        while row >= rows:
            row -= rows
            path, rows = next(files)
        return f"{path}, row {row + 1}" if is_parquet(path) else f"{path}, line {row + self.first_line}"
