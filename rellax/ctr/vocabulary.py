"""What the codes of a CRM's features stand for: found in the data that it is trained on, and kept with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rellax._files import read_json, write_json
from rellax.ctr.dataset import Dataset
from rellax.errors import InputError


@dataclass(frozen=True)
class Feature:
    """A column of the table of users or of items.

    Attributes:
        values: each once; their places are the codes.
        usual: the code that most rows have. A value that is not among them has it too, or is an error where
            this is None.
    """

    column: str
    values: pa.Array
    usual: int | None

    @classmethod
    def of(cls, table: pa.Table, column: str) -> Feature:
        values = table[column].unique()
        values = values.take(pc.array_sort_indices(values))
        codes = pc.index_in(table[column], value_set=values).to_numpy()
        return cls(column, values, int(np.bincount(codes).argmax()))

    def codes(self, table: pa.Table) -> np.ndarray:
        """The code of each row, of a table that may be newer.

        Raises:
            InputError: the table lacks the column, or has a value that is an error.
        """
        if self.column not in table.column_names:
            found = ", ".join(table.column_names)
            raise InputError(f"features: expected {self.column!r}, which the CRM reads, found {found}")
        codes = pc.index_in(table[self.column], value_set=self.values)
        if codes.null_count and self.usual is None:
            raise InputError(f"{self.column}: expected one that the CRM was trained on, got another")
        return pc.fill_null(codes, self.usual or 0).to_numpy()


@dataclass(frozen=True)
class Vocabulary:
    """Of all features of a data set.

    Attributes:
        users, items: in the order of the data's features.
        ratings: of behaviours, rising.
    """

    users: list[Feature]
    items: list[Feature]
    ratings: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, *, user_id: bool) -> Vocabulary:
        """That of a data set; with `user_id` users' ids are one more feature."""
        names = dataset.meta["features"]
        users = [Feature.of(dataset.users, name) for name in names["user"]]
        if user_id:
            users.append(Feature("user_id", dataset.users["user_id"].combine_chunks(), None))
        items = [Feature.of(dataset.items, name) for name in names["item"]]
        return cls(users, items, np.unique(dataset.behaviour_ratings).astype(np.float64))

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """What `write` has written.

        Raises:
            InputError: the file is missing or damaged.
        """
        found = read_json(path, maker="rellax crm")
        try:
            users, items = ([_feature(**entry) for entry in found[kind]] for kind in ("users", "items"))
            ratings = np.array(found["ratings"], dtype=np.float64)
            if ratings.ndim == 1 and len(ratings):
                return cls(users, items, ratings)
        except (KeyError, TypeError, ValueError, OverflowError, pa.ArrowException):
            pass
        raise InputError(f"{path}: expected the vocabulary of `rellax crm`, found another")

    def write(self, path: Path) -> None:
        kinds = {"users": self.users, "items": self.items}
        found: dict[str, Any] = {
            kind: [vars(feature) | {"values": feature.values.to_pylist()} for feature in features]
            for kind, features in kinds.items()
        }
        write_json(path, found | {"ratings": self.ratings.tolist()})

    def rating_codes(self, ratings: np.ndarray) -> np.ndarray:
        """The place of each rating; that of the nearest one for a rating which is not among them."""
        return np.searchsorted((self.ratings[1:] + self.ratings[:-1]) / 2, ratings)


def _feature(column: str, values: list[str | None], usual: int | None) -> Feature:
    """A feature as JSON has it, checked."""
    if not isinstance(values, list) or not isinstance(column, str):
        raise TypeError(column)
    if usual is not None and (type(usual) is not int or not 0 <= usual < len(values)):
        raise ValueError(usual)
    return Feature(column, pa.array(values, pa.string()), usual)
