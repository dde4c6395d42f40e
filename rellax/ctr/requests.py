"""Rows that ask for a probability, and the small data set of their own that a batch of them makes.

Whatever reads samples (retrieval, prompts, the CRM) reads these as well: users and histories of such a data
set are those that the rows need, items are those of the prepared data.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rellax.ctr.dataset import Dataset, Samples
from rellax.ctr.sources.tables import NUMBER
from rellax.errors import InputError, shown

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_NONE = ("NaTType", "NAType")  # of pandas, which need not be there


@dataclass(frozen=True)
class Request:
    """A row that can be answered.

    Attributes:
        user: in the prepared data; None is a new one.
        item: in the prepared data.
        position: how many behaviours come before.
        history: items and ratings of these behaviours, where they are not the user's first ones.
        person: of a new user, what is known: `profile`, and features for the CRM.
    """

    user: int | None
    item: int
    position: int
    history: tuple[np.ndarray, np.ndarray] | None = None
    person: Mapping[str, str] = field(default_factory=dict)


class Requests:
    """Reads rows against a prepared data set."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._people = dataset.users.combine_chunks()
        self._users = _row_of(dataset.users["user_id"])
        self._items = _row_of(dataset.items["item_id"])
        self._ratings = set(np.unique(dataset.behaviour_ratings).tolist())

    def read(self, row: Mapping[str, Any]) -> Request:
        """What a row asks for; what it holds is in `rellax.ctr.predictor.Predictor.predict`.

        Raises:
            InputError: a value is missing or of the wrong kind, an id is not known, or there is no behaviour
                to go by.
        """
        if not isinstance(row, Mapping):
            raise InputError(f"expected an object with user_id and item_id, found {shown(row)}")
        given = _value(row, "history")
        name = _id(row, "user_id", optional=given is not None)
        item_name = _id(row, "item_id")
        user, item = self._users.get(name), self._items.get(item_name)
        if user is None and given is None:
            raise InputError(f"user_id {shown(name)} is not in the data, expected one that is, or a history")
        if item is None:
            raise InputError(f"item_id {shown(item_name)} is not in the data")
        time = None if _value(row, "time") is None else self._time(row)
        rows = self._known(user, time)
        history, position = None, rows.stop - rows.start
        if given is not None:
            new = self._behaviours(given)
            if given and not len(new[0]) and not position:
                raise InputError("expected a history with items that are in the data, found none of them")
            history = self._merged(rows, new, time)
            position = len(history[0])
        if not position and self._dataset.meta.get("min_history") != 0:  # else trained on such as well
            before = "" if time is None else " before that time"
            whose = f" of {shown(name)}" if name else ""
            raise InputError(f"expected a user with behaviours{before}, found none{whose}")
        person = self._person(_value(row, "user")) if user is None else {}
        return Request(user, item, position, history, person)

    def dataset(self, requests: Sequence[Request]) -> Dataset:
        """A data set with a sample for each request, in their order; its users are those that they need."""
        data = self._dataset
        people: list[int | Mapping[str, str]] = []
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        row_of: dict[int, int] = {}
        users = []
        for request in requests:
            if request.history is None and request.user is not None:
                users.append(row_of.setdefault(request.user, len(people)))
                if users[-1] < len(people):
                    continue
                history = slice(data.offsets[request.user], data.offsets[request.user + 1])
                parts.append((data.behaviour_items[history], data.behaviour_ratings[history]))
            else:
                assert request.history is not None, "a new user brings one"
                users.append(len(people))
                parts.append(request.history)
            people.append(request.person if request.user is None else request.user)
        unknown = np.full(len(requests), -1, dtype=np.int8)
        return replace(
            data,
            users=self._table(people),
            behaviour_items=np.concatenate([items for items, _ in parts]),
            behaviour_ratings=np.concatenate([ratings for _, ratings in parts]),
            offsets=np.cumsum([0, *(len(items) for items, _ in parts)]),
            samples=Samples(
                user=np.array(users, dtype=np.int32),
                item=np.array([request.item for request in requests], dtype=np.int32),
                position=np.array([request.position for request in requests], dtype=np.int32),
                label=unknown,
                split=unknown,
            ),
        )

    def _known(self, user: int | None, time: int | None) -> slice:
        """Rows of the prepared behaviours that a user has before a time."""
        if user is None:
            return slice(0, 0)
        start, end = self._dataset.offsets[user : user + 2].tolist()
        if time is not None:
            times = self._dataset.behaviour_times[start:end]
            end = start + int(np.searchsorted(times, time, side="left"))
        return slice(start, end)

    def _behaviours(self, given: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items, ratings and times of what comes with a row; behaviours of unknown items are left out."""
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise InputError(f"expected history as a list of behaviours, found {shown(given)}")
        items, ratings, times = [], [], []
        for number, behaviour in enumerate(given):
            try:
                if not isinstance(behaviour, Mapping):
                    raise InputError(f"expected an object, found {shown(behaviour)}")
                item = self._items.get(_id(behaviour, "item_id"))
                rating = self._rating(behaviour)
                time = self._time(behaviour) if self._dataset.meta["timed"] else 0
            except InputError as error:
                raise InputError(f"history[{number}]: {error}") from None
            if item is not None:
                items.append(item)
                ratings.append(rating)
                times.append(time)
        return np.array(items, np.int32), np.array(ratings, np.float32), np.array(times, np.int64)

    def _merged(
        self, rows: slice, new: tuple[np.ndarray, np.ndarray, np.ndarray], time: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Known and new behaviours in the order of `rellax prepare`; what is known already counts once."""
        data = self._dataset
        known = data.behaviour_items[rows], data.behaviour_ratings[rows], data.behaviour_times[rows]
        items, ratings, times = (np.concatenate(pair) for pair in zip(known, new, strict=True))
        if not data.meta["timed"]:  # an item counts once, where it comes last
            _, from_the_end = np.unique(items[::-1], return_index=True)
            kept = np.sort(len(items) - 1 - from_the_end)
            return items[kept], ratings[kept]
        is_new = np.arange(len(items)) >= rows.stop - rows.start
        order = np.lexsort((is_new, items, times))
        again = np.zeros(len(items), dtype=bool)
        again[1:] = (np.diff(items[order]) == 0) & (np.diff(times[order]) == 0)
        kept = order[~(again & is_new[order])]
        if time is not None:
            kept = kept[times[kept] < time]
        return items[kept], ratings[kept]

    def _rating(self, behaviour: Mapping[str, Any]) -> float:
        value = _value(behaviour, "rating")
        if value is None:
            value = self._dataset.meta["unrated"]
        is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        is_number |= isinstance(value, bool | np.bool_) and self._dataset.meta["answers"] is not None
        if not is_number or not abs(value) < 1e30 or float(np.float32(value)) not in self._ratings:
            known = ", ".join(f"{rating:g}" for rating in sorted(self._ratings))
            raise InputError(f"expected a rating of the data, {known}, found {shown(value)}")
        return float(value)

    def _time(self, row: Mapping[str, Any]) -> int:
        """A number without its fraction, or where the data have dates, a date as milliseconds since 1970."""
        data, value = self._dataset, _value(row, "time")
        if not data.meta["timed"]:
            raise InputError(f"expected no time, the data in {data.folder} have no times")
        if value is None:
            raise InputError("expected a value of time, found none")
        dates = data.meta.get("dates", False)
        try:
            return _milliseconds(value) if dates and not _is_number(value) else _whole(value)
        except (ValueError, TypeError):
            wanted = "a date, or milliseconds since 1970" if dates else "a number"
            raise InputError(f"expected time as {wanted}, found {shown(value)}") from None

    def _person(self, given: Any) -> dict[str, str]:
        known = ("profile", *self._dataset.meta["features"]["user"])
        if given is None:
            return {}
        if not isinstance(given, Mapping) or not set(given) <= set(known):
            raise InputError(f"expected user as an object of {', '.join(known)}, found {shown(given)}")
        told = {name: str(given[name]) for name in given if _value(given, name) is not None}
        for name, text in told.items():
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"expected {name} of user as Unicode, found {shown(text)}")
        return told

    def _table(self, people: Sequence[int | Mapping[str, str]]) -> pa.Table:
        rows = pa.array([person if isinstance(person, int) else None for person in people], pa.int64())
        table = self._people.take(rows)
        if not rows.null_count:
            return table
        for name in ("profile", *self._dataset.meta["features"]["user"]):
            values = table[name].to_pylist()
            for row, person in enumerate(people):
                if not isinstance(person, int):
                    values[row] = person.get(name, "" if name == "profile" else None)
            index = table.column_names.index(name)
            table = table.set_column(index, name, pa.array(values, pa.string()))
        return table


def _row_of(ids: pa.ChunkedArray) -> dict[str, int]:
    return {name: row for row, name in enumerate(pc.cast(ids, pa.string()).to_pylist())}


def _value(row: Mapping[str, Any], name: str) -> Any:
    """What a row has of that name; None also for what NumPy and pandas have for none."""
    value = row.get(name)
    is_nan = isinstance(value, float | np.floating | np.datetime64) and value != value
    return None if is_nan or type(value).__name__ in _NONE else value


def _id(row: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    value = _value(row, name)
    if value is None or value == "":
        if optional:
            return ""
        raise InputError(f"expected a value of {name}, found none")
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(pa.scalar(value).cast(pa.string()))  # as `rellax prepare` reads it
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise InputError(f"expected {name} as text or a whole number, found {shown(value)}")
    return str(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return NUMBER.fullmatch(value.strip()) is not None
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(value: Any) -> int:
    """A number without its fraction, which `rellax prepare` cuts as well."""
    if not _is_number(value):
        raise ValueError(value)
    whole = int(value.partition(".")[0] if isinstance(value, str) else value)
    if not -(2**63) <= whole < 2**63:
        raise ValueError(value)
    return whole


def _milliseconds(value: Any) -> int:
    """Of a date, a datetime, NumPy's or ISO 8601 text; without a time zone it is UTC."""
    if isinstance(value, np.datetime64):
        return int(value.astype("datetime64[ms]").astype(np.int64))
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
    elif not isinstance(value, datetime.date):
        raise TypeError(value)
    elif not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    if value.tzinfo is None:
        value = value.replace(tzinfo=datetime.timezone.utc)
    return int((value - _EPOCH) // datetime.timedelta(milliseconds=1))
