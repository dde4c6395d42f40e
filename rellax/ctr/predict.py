"""Probabilities for rows of any number: a table in, the same with one more column out, or JSON line by line.

Some rows are in memory at a time. Within these, prompts of like length go through the model together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from tqdm import tqdm

from rellax._files import atomic_file
from rellax.ctr.predictor import Answer, Predictor
from rellax.ctr.sources import event_columns
from rellax.errors import InputError, one_line, shown

logger = logging.getLogger(__name__)

COLUMN, ERROR = "probability", "error"
ERRORS = ("stop", "answer")
STREAM = "-"
"""In place of a path: standard input, or output."""

_NAMES = {name: name for name in ("user_id", "item_id", "time")}
_ROWS = 8192
_BYTES = 1 << 20
_BROUGHT = ("history", "user")
"""What rows may bring beside ids and time, unless a column map calls something else so."""
_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)


def predict(
    run: str | Path,
    table: str | Path = STREAM,
    out: str | Path = STREAM,
    *,
    columns: str | Path | None = None,
    errors: str = "stop",
    data: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
    calibrated: bool = True,
    progress: bool = True,
) -> int:
    """Answer each row of a table, or each JSON object of a stream, and return how many there were.

    A row is what `Predictor.predict` takes. Rows come out in their order with their `probability`, without
    the `history` and `user` that they may have brought. A file appears whole, at the end. To standard output
    answers go as soon as they are there: whatever lines have arrived are answered together.

    Args:
        run: folder of `rellax train`.
        table: .parquet, .csv, or .jsonl (a JSON object a line); "-" is standard input, JSON lines.
        out: .parquet or .csv for a table; .jsonl, or "-" for standard output, for JSON lines.
        columns: column map of own data, where rows have its names, and CSV files its delimiter.
        errors: what becomes of a row that cannot be answered. "stop" ends with an error that names it; lines
            before it are answered. "answer" gives it, in place of a probability, a text `error`.
        data, device, batch_size, calibrated: as for `Predictor`.

    Raises:
        InputError: a file is missing, damaged or of another kind, or a row cannot be answered.
    """
    if errors not in ERRORS:
        raise InputError(f"errors: expected one of {', '.join(ERRORS)}, got {errors!r}")
    is_stream = str(table) == STREAM
    _check_kind(table, (".csv", ".parquet", ".jsonl"), stream=True)
    if not is_stream and not Path(table).is_file():
        raise InputError(f"{table}: expected a table, found none")
    names, delimiter = _NAMES, ","
    if columns is not None:
        names, delimiter = event_columns(columns)

    def load() -> Predictor:
        return Predictor(run, data=data, device=device, batch_size=batch_size, calibrated=calibrated)

    if is_stream or Path(table).suffix == ".jsonl":
        _check_kind(out, (".jsonl",), stream=True)
        bar = tqdm(desc="predict", unit="row", disable=is_stream or not progress)
        lines = _Lines("standard input" if is_stream else str(table), names, errors)
        with bar, _source(table) as source, _sink(out) as sink:
            lines.answer(source, sink, load(), bar)
        return lines.count
    if str(out) == STREAM:
        raise InputError(f"--out: expected a file that ends in .csv or .parquet, got {STREAM!r}")
    _check_kind(out, (".csv", ".parquet"))
    return _Table(Path(table), names, delimiter, errors).answer(Path(out), load, progress)


class _Table:
    """A .parquet or .csv file, some rows at a time."""

    def __init__(self, path: Path, names: Mapping[str, str], delimiter: str, errors: str) -> None:
        self.path, self.delimiter, self.errors = path, delimiter, errors
        self.rows: int | None = None  # a CSV file does not say how many it has
        with self._readable():
            self.schema = self._open_csv() if path.suffix == ".csv" else self._open_parquet()
            found = self.schema.names  # decoded here
        if len(set(found)) < len(found):
            raise InputError(f"{path}: expected each column once, found {', '.join(found)}")
        for name in (names["user_id"], names["item_id"]):
            if name not in found:
                hint = "; --columns takes a column map with other names" if names is _NAMES else ""
                raise InputError(f"{path}: expected a column {name!r}, found {', '.join(found)}{hint}")
        self.added = [COLUMN, ERROR] if errors == "answer" else [COLUMN]
        for name in self.added:
            if name in found:
                raise InputError(f"{path}: expected no column {name!r}, it is what is added")
        brought = [name for name in _brought(names) if name in found and self._is_brought(name)]
        self.time = names.get("time", "time")
        self.names = {ours: theirs for ours, theirs in names.items() if theirs in found}
        self.names |= {name: name for name in brought}
        self.shown = [name for name in found if name not in brought]

    def answer(self, out: Path, load: Callable[[], Predictor], progress: bool) -> int:
        """Write the answers; who gives them is loaded once there is a row."""
        fields = [self.schema.field(name) for name in self.shown]
        if out.suffix == ".csv":
            for field in fields:
                self._check_for_csv(field)
        batches = self._batches()
        first = next(batches, None)
        if first is None:
            raise InputError(f"{self.path}: expected at least one row, found none")
        predictor, count = load(), 0
        if predictor.timed and "time" not in self.names:
            logger.info(
                "%s: no column %r, so every row is answered from all that is known of its user",
                self.path,
                self.time,
            )
        types = {COLUMN: pa.float64(), ERROR: pa.string()}
        schema = pa.schema(fields + [pa.field(name, types[name]) for name in self.added])
        with (
            tqdm(total=self.rows, desc="predict", unit="row", disable=not progress) as bar,
            atomic_file(out) as part,
            self._writer(part, schema) as file,
        ):
            for batch in itertools.chain([first], batches):
                answers = self._answers(batch, predictor, count, bar)
                added = {COLUMN: list(map(_probability, answers)), ERROR: list(map(_error, answers))}
                columns = [batch[name] for name in self.shown]
                columns += [pa.array(added[name], types[name]) for name in self.added]
                file.write_table(pa.Table.from_arrays(columns, schema=schema))
                count += batch.num_rows
        return count

    def _writer(self, path: Path, schema: pa.Schema) -> pa.csv.CSVWriter | pq.ParquetWriter:
        """In CSV with the delimiter of the column map, which goes for what is written from it as well."""
        if path.suffix != ".csv":
            return pq.ParquetWriter(path, schema)
        return pa.csv.CSVWriter(path, schema, write_options=pa.csv.WriteOptions(delimiter=self.delimiter))

    def _is_brought(self, name: str) -> bool:
        """Whether a column of that name is what rows bring; any other column `user` is passed through."""
        kind = self.schema.field(name).type
        if name == "user":
            return bool(pa.types.is_struct(kind))
        if not isinstance(kind, _LISTS) and not pa.types.is_null(kind):
            raise InputError(
                f"{self.path}: expected history as lists of behaviours, in Parquet, found {one_line(kind)}"
            )
        return True

    def _check_for_csv(self, field: pa.Field) -> None:
        try:
            pa.csv.CSVWriter(pa.BufferOutputStream(), pa.schema([field])).close()
        except pa.ArrowException:
            raise InputError(
                f"{self.path}: expected columns that CSV can hold, or --out ….parquet, "
                f"found {field.name!r} of {one_line(field.type)}"
            ) from None

    def _answers(self, batch: pa.RecordBatch, predictor: Predictor, start: int, bar: tqdm) -> list[Answer]:
        asked = pa.Table.from_arrays([batch[name] for name in self.names.values()], list(self.names))
        rows = asked.to_pylist()
        if self.errors == "answer":
            return predictor.predict_each(rows, done=bar.update)
        unit, first = ("line", 2) if self.path.suffix == ".csv" else ("row", 1)
        probabilities = predictor.predict(
            rows, place=lambda row: f"{self.path}, {unit} {start + row + first}", done=bar.update
        )
        return list(probabilities.tolist())

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self._readable():
            for batch in self._reader:
                for start in range(0, batch.num_rows, _ROWS):
                    yield batch.slice(start, _ROWS)

    def _open_parquet(self) -> pa.Schema:
        file = pq.ParquetFile(self.path, pre_buffer=False)  # or it holds the columns whole
        self.rows = file.metadata.num_rows
        self._reader: Iterator[pa.RecordBatch] = file.iter_batches(_ROWS)
        return file.schema_arrow

    def _open_csv(self) -> pa.Schema:
        """All columns as text, so that what is passed through stays as it is."""
        options: dict[str, Any] = {
            "read_options": pa.csv.ReadOptions(block_size=_BYTES),
            "parse_options": pa.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
        }
        with pa.csv.open_csv(self.path, **options) as file:
            types = dict.fromkeys(file.schema.names, pa.string())
        convert = pa.csv.ConvertOptions(
            column_types=types,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        reader = pa.csv.open_csv(self.path, convert_options=convert, **options)
        self._reader = iter(reader)
        return reader.schema

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise InputError(f"{self.path}: expected a readable table, but {one_line(error)}") from None


class _Lines:
    """JSON objects, a line each."""

    def __init__(self, place: str, names: Mapping[str, str], errors: str) -> None:
        self.place, self.errors, self.count = place, errors, 0
        self.brought = _brought(names)
        self.names = {**names, **{name: name for name in self.brought}}

    def answer(self, source: BinaryIO, sink: BinaryIO, predictor: Predictor, bar: tqdm) -> None:
        """Answer each line as soon as those are that have arrived with it; empty lines are passed over."""
        number = 0
        for lines in _arriving(source):
            asked = []
            for line in lines:
                number += 1
                if line.strip():
                    asked.append((number, _object(line)))
            rows = [self._ours(found) for _, found in asked if not isinstance(found, InputError)]
            answers = iter(predictor.predict_each(rows, done=bar.update))
            for line_number, found in asked:
                answer = found if isinstance(found, InputError) else next(answers)
                if isinstance(answer, InputError) and self.errors == "stop":
                    sink.flush()
                    raise InputError(f"{self.place}, line {line_number}: {answer}")
                sink.write(self._answered({} if isinstance(found, InputError) else found, answer))
            sink.flush()
            self.count += len(asked)

    def _ours(self, row: dict[str, Any]) -> dict[str, Any]:
        return {ours: row.get(theirs) for ours, theirs in self.names.items()}

    def _answered(self, row: Mapping[str, Any], answer: Answer) -> bytes:
        shown = {name: value for name, value in row.items() if name not in self.brought}
        shown |= {ERROR: _error(answer)} if isinstance(answer, InputError) else {COLUMN: answer}
        try:
            return json.dumps(shown, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
            return json.dumps(shown).encode() + b"\n"


def _brought(names: Mapping[str, str]) -> list[str]:
    return [name for name in _BROUGHT if name not in names.values()]


def _arriving(source: BinaryIO) -> Iterator[list[bytes]]:
    """Whole lines, as soon as there are any: all that have arrived, up to a bound."""
    rest = b""
    while block := source.read1(_BYTES):  # type: ignore[attr-defined]
        *lines, rest = (rest + block).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _object(line: bytes) -> dict[str, Any] | InputError:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"expected a JSON object, but {error}")
    return found if isinstance(found, dict) else InputError(f"expected a JSON object, found {shown(found)}")


def _probability(answer: Answer) -> float | None:
    return None if isinstance(answer, InputError) else answer


def _error(answer: Answer) -> str | None:
    return str(answer) if isinstance(answer, InputError) else None


@contextlib.contextmanager
def _source(path: str | Path) -> Iterator[BinaryIO]:
    if str(path) == STREAM:
        yield sys.stdin.buffer
        return
    with Path(path).open("rb") as file:
        yield file


@contextlib.contextmanager
def _sink(path: str | Path) -> Iterator[BinaryIO]:
    """A file that appears whole, or standard output, whose reader may go away."""
    if str(path) != STREAM:
        with atomic_file(path) as part, part.open("wb") as file:
            yield file
        return
    try:
        yield sys.stdout.buffer
    except BrokenPipeError:  # or Python complains once more when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_kind(path: str | Path, endings: tuple[str, ...], *, stream: bool = False) -> None:
    if Path(path).suffix not in endings and not (stream and str(path) == STREAM):
        wanted = "a file that ends in " + " or ".join(endings)
        raise InputError(f"{path}: expected {wanted}" + (f", or {STREAM!r}" if stream else ""))
