"""Typed columns out of delimited text and Parquet, block by block, with errors that name file and line.

What is held is the typed columns: repeated strings are asked for as dictionaries (`ID`), four bytes a row.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from rellax.errors import InputError, one_line, shortened, shown

ID = pa.dictionary(pa.int32(), pa.string())
TEXT = pa.string()
RATING = pa.float32()
TIME = pa.int64()
MOMENT = pa.timestamp("ms")  # dates, read as a TIME
FLOAT_TIME = pa.float64()  # numbers, likewise
LABEL = pa.bool_()  # read as a RATING

_BLOCK_BYTES = 1 << 24
_BLOCK_ROWS = 1 << 20
_EXPECTED = {
    ID: "a value",
    TEXT: "text",
    RATING: "a number",
    TIME: "a whole number",
    MOMENT: "a date and time",
    FLOAT_TIME: "a number",
    LABEL: "a label 0, 1, true or false",
}
_STORED = {MOMENT: TIME, FLOAT_TIME: TIME, LABEL: RATING}
_OTHERS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
NUMBER = re.compile(r"-?\d+(\.\d*)?")  # a time, whose fraction is cut
_ZONE = r"^.{11,}(Z|[+-]\d\d(:?\d\d)?)$"  # a date alone has hyphens too
_BAD_VALUE = re.compile(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to [^:]+: (.*)", re.DOTALL)
_BAD_ROW = re.compile(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)")


@dataclass(frozen=True)
class Format:
    """A dialect of delimited text.

    Attributes:
        delimiter: one character.
        quoted: whether values may stand in double quotes, and then hold delimiters and line ends.
        encoding: of the text.
        header: the names of the columns, where the file's first line does not give them.
        replace: bytes to replace beforehand, such as a separator of two characters by `delimiter`; the file
            is then read in one piece.
        skip_lines: lines at the beginning to pass over.
        broken: told of every row with too many or too few fields, which is left out; None makes it an error.
    """

    delimiter: str = ","
    quoted: bool = False
    encoding: str = "utf8"
    header: Sequence[str] | None = None
    replace: Sequence[tuple[bytes, bytes]] = ()
    skip_lines: int = 0
    broken: Callable[[], None] | None = None


def read_text(path: Path, columns: Mapping[str, pa.DataType], form: Format) -> pa.Table:
    """The named columns of a delimited file, in that order, of these types; an `ID` has a value in every row.

    A `MOMENT` is ISO 8601, in UTC where no zone is given, and becomes milliseconds since 1970. Of a
    `FLOAT_TIME` the fraction is cut. A `LABEL` is a number, true or false.

    Raises:
        InputError: the file or a column is missing, or a line cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected this file, found none")
    _check_is_text(path, form)
    names = form.header
    first = 1 if names and not form.skip_lines else 2
    try:
        _check_once(f"{path}, line 1", columns, _header(path, form))
        with _open(path, form) as file:
            reader = pa.csv.open_csv(
                file,
                read_options=pa.csv.ReadOptions(
                    use_threads=False,  # with one thread, errors name the line
                    block_size=_BLOCK_BYTES,
                    encoding=form.encoding,
                    column_names=names,
                    skip_rows=form.skip_lines,
                ),
                parse_options=pa.csv.ParseOptions(
                    delimiter=form.delimiter,
                    quote_char='"' if form.quoted else False,
                    newlines_in_values=form.quoted,
                    ignore_empty_lines=form.broken is not None,
                    invalid_row_handler=None if form.broken is None else _skipper(form.broken),
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types={name: TEXT if kind in _STORED else kind for name, kind in columns.items()},
                    include_columns=list(columns),
                    strings_can_be_null=False,
                    null_values=[],
                ),
            )
            batches = _parsed_batches(path, columns, form, reader, first)
            table = pa.Table.from_batches(batches, _schema(columns))
    except pa.ArrowKeyError:
        raise InputError(_missing(f"{path}, line 1", columns, _header(path, form))) from None
    except (pa.ArrowException, UnicodeError, csv.Error) as error:
        raise InputError(_explained(path, columns, form, " ".join(str(error).split()))) from None
    for name, kind in columns.items():
        if kind == ID:
            _check_filled(path, name, table[name], first)
    return table


def read_parquet(path: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """The named columns of a Parquet file, in that order and of these types; an id may also be a number.

    A `MOMENT` is a date or timestamp and becomes milliseconds since 1970. It, a `FLOAT_TIME` and a `LABEL`
    may also be text as in :func:`read_text`. Only `TEXT` may be missing.

    Raises:
        InputError: the file or a column is missing, is damaged, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected this file, found none")
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # or it holds the columns whole
            found = file.schema_arrow.names
            if not set(columns) <= set(found):
                raise InputError(_missing(str(path), columns, found))
            _check_once(str(path), columns, found)
            schema = _schema(columns)
            batches, row = [], 0
            for batch in file.iter_batches(_BLOCK_ROWS, columns=list(columns)):
                arrays = [_converted(path, name, batch[name], kind, row) for name, kind in columns.items()]
                batches.append(pa.record_batch(arrays, schema=schema))
                row += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{path}: expected Parquet, but it is damaged ({one_line(error)})") from None
    return pa.Table.from_batches(batches, schema)


def is_parquet(path: Path) -> bool:
    """By its ending, or by its first bytes: PAR1, and the first field of a header in Thrift's encoding."""
    if path.suffix == ".parquet" or not path.is_file():
        return path.suffix == ".parquet"
    with path.open("rb") as file:
        return file.read(5) == b"PAR1\x15"


def time_type(path: Path, name: str, delimiter: str) -> pa.DataType | None:
    """What a column of times is by its first value, `MOMENT` or `FLOAT_TIME`; None where there is no value.

    Raises:
        InputError: the first value is missing.
    """
    value: str | None = None
    try:
        if is_parquet(path):
            row = 1
            with pq.ParquetFile(path, pre_buffer=False) as file:
                kind = file.schema_arrow.field(name).type
                batch = next(file.iter_batches(1, columns=[name]), None)
            if batch is None:
                return None
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not _is_text(kind):
                return MOMENT if _is_date(kind) else FLOAT_TIME
            value = batch[name][0].as_py() or ""
        else:
            row = 2
            with path.open(encoding="utf-8-sig", errors="replace", newline="") as text:
                value = next(csv.DictReader(text, delimiter=delimiter), {}).get(name)
    except (pa.ArrowException, OSError, UnicodeError, KeyError, csv.Error):
        pass  # the reader of the whole file says what is wrong
    if value is None:
        return None
    if not value.strip():
        raise InputError(
            f"{path}, row {row}: expected a whole number or a date as ISO 8601 in {name!r}, found none"
        )
    return FLOAT_TIME if NUMBER.fullmatch(value.strip()) else MOMENT


def strings(table: pa.Table, name: str) -> list[str]:
    """A column of text as a list."""
    return [str(value) for value in table[name].to_pylist()]


def _schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema([(name, _STORED.get(kind, kind)) for name, kind in columns.items()])


def _floored(moments: pa.Array) -> pa.Array:
    """Without finer fractions than milliseconds; a cast alone would cut those before 1970 the other way."""
    whole = pa.types.is_date(moments.type) or moments.type.unit in ("s", "ms")
    return moments if whole else pc.floor_temporal(moments, unit="millisecond")


def _is_date(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _converted(path: Path, name: str, column: pa.Array, kind: pa.DataType, row: int) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    wanted = TEXT if kind == ID else _STORED.get(kind, kind)
    try:
        if kind == TEXT:
            column = pc.fill_null(pc.cast(column, TEXT), "")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: expected text as {name!r} ({one_line(error)})") from None
    if column.null_count:
        where = row + column.is_null().to_pylist().index(True) + 1
        raise InputError(f"{path}, row {where}: expected {_EXPECTED[kind]} as {name!r}, found none")
    if kind in _STORED and _is_text(column.type):
        return _parsed(f"{path}, row", name, pc.cast(column, TEXT), kind, row + 1)
    if kind in (MOMENT, FLOAT_TIME) and _is_date(column.type) != (kind == MOMENT):
        raise InputError(f"{path}: expected {_EXPECTED[kind]} as {name!r}, found {one_line(column.type)}")
    try:
        if kind == MOMENT:
            column = pc.cast(_floored(column), MOMENT)
        elif kind == FLOAT_TIME and not pa.types.is_integer(column.type):
            column = pc.trunc(column)
        column = pc.cast(column, wanted)
        if wanted == TEXT:
            column.validate(full=True)  # nothing else looks whether it is UTF-8
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: expected {_EXPECTED[kind]} as {name!r} ({one_line(error)})") from None
    return column.dictionary_encode() if kind == ID else column


def _check_is_text(path: Path, form: Format) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    for mark, name in _OTHERS.items():
        if start.startswith(mark):
            raise InputError(f"{path}: expected plain text in {form.encoding}, found {name}")


def _parsed_batches(
    path: Path,
    columns: Mapping[str, pa.DataType],
    form: Format,
    batches: Iterable[pa.RecordBatch],
    row: int,
) -> Iterator[pa.RecordBatch]:
    """The batches of a file, the first of which begins in `row`, with numbers where text stood for them."""
    place = f"{path}, {'row' if form.quoted else 'line'}"
    for batch in batches:
        arrays = [
            _parsed(place, name, batch[name], kind, row) if kind in _STORED else batch[name]
            for name, kind in columns.items()
        ]
        yield pa.record_batch(arrays, names=list(columns))
        row += batch.num_rows


def _parsed(place: str, name: str, text: pa.Array, kind: pa.DataType, row: int) -> pa.Array:
    try:
        return _PARSERS[kind](text)
    except pa.ArrowInvalid:
        wrong = _first_wrong(text, _PARSERS[kind])
        found = shown(text[wrong].as_py())
        raise InputError(
            f"{place} {row + wrong}: expected {_EXPECTED[kind]} as {name!r}, found {found}"
        ) from None


def _milliseconds(text: pa.Array) -> pa.Array:
    """ISO 8601 as milliseconds since 1970; finer fractions of a second are cut."""
    text = pc.replace_substring_regex(text, r"(\.\d{3})\d+", r"\1")
    zoned, none = pc.match_substring_regex(text, _ZONE), pa.scalar(None, TEXT)
    utc = pc.cast(pc.if_else(zoned, text, none), pa.timestamp("ms", "UTC"))
    return pc.coalesce(pc.cast(utc, TIME), pc.cast(pc.cast(pc.if_else(zoned, none, text), MOMENT), TIME))


def _whole(text: pa.Array) -> pa.Array:
    """Numbers without their fractions."""
    text = pc.ascii_trim_whitespace(text)
    if pc.any(pc.match_substring(text, ".")).as_py():
        text = pc.replace_substring_regex(text, r"^(-?\d+)\.\d*$", r"\1")
    return pc.cast(text, TIME)


def _labels(text: pa.Array) -> pa.Array:
    text = pc.ascii_lower(pc.ascii_trim_whitespace(text))
    words = pc.index_in(text, value_set=pa.array(["false", "true"]))
    return pc.cast(pc.coalesce(pc.cast(words, TEXT), text), RATING)


_PARSERS = {MOMENT: _milliseconds, FLOAT_TIME: _whole, LABEL: _labels}
"""What makes of such text what is stored."""


def _first_wrong(text: pa.Array, read: Callable[[pa.Array], pa.Array]) -> int:
    """Which is the first that cannot be read, by halves: there is one."""
    start, end = 0, len(text)
    while end - start > 1:
        middle = (start + end) // 2
        try:
            read(text[start:middle])
            start = middle
        except pa.ArrowInvalid:
            end = middle
    return start


def _open(path: Path, form: Format) -> Any:
    if not form.replace:
        return path.open("rb")
    data = path.read_bytes()
    for old, new in form.replace:
        data = data.replace(old, new)
    return io.BytesIO(data)


def _skipper(broken: Callable[[], None]) -> Callable[[Any], str]:
    def skip(_: Any) -> str:
        broken()
        return "skip"

    return skip


def _header(path: Path, form: Format) -> list[str]:
    if form.header is not None:
        return list(form.header)
    encoding = "utf-8-sig" if form.encoding == "utf8" else form.encoding
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        if not form.quoted:
            return file.readline().rstrip("\r\n").split(form.delimiter)
        return next(csv.reader(file, delimiter=form.delimiter), [])


def _missing(place: str, columns: Mapping[str, pa.DataType], found: Sequence[str]) -> str:
    lacking = next((name for name in columns if name not in found), next(iter(columns)))
    return f"{place}: expected a column {lacking!r}, found {', '.join(shown(name) for name in found)}"


def _explained(path: Path, columns: Mapping[str, pa.DataType], form: Format, error: str) -> str:
    """Arrow's complaint as our sentence."""
    place = "row" if form.quoted else "line"
    if match := _BAD_ROW.search(error):
        row, expected, got = match.groups()
        return f"{path}, {place} {int(row) + form.skip_lines}: expected {expected} fields, found {got}"
    if match := _BAD_VALUE.search(error):
        column, row, reason = match.groups()
        header = _header(path, form)
        name = header[int(column)] if int(column) < len(header) else ""
        expected = "UTF-8" if "UTF8" in reason else _EXPECTED.get(columns.get(name), "a value")
        found = shortened(reason.removeprefix("invalid value "))
        return f"{path}, {place} {int(row) + form.skip_lines}: expected {expected} as {name!r}, found {found}"
    return f"{path}: expected fields with {form.delimiter!r} between them ({shortened(error)})"


def _check_once(place: str, columns: Mapping[str, pa.DataType], found: Sequence[str]) -> None:
    for name in columns:
        if found.count(name) > 1:
            raise InputError(f"{place}: expected one column {name!r}, found {found.count(name)}")


def _check_filled(path: Path, name: str, column: pa.ChunkedArray, first: int) -> None:
    row = 0
    for chunk in column.chunks:
        code = pc.index(chunk.dictionary, "").as_py()
        if code >= 0:
            line = row + int(np.flatnonzero(chunk.indices.to_numpy() == code)[0]) + first
            raise InputError(f"{path}, line {line}: expected a value of {name!r}, found none")
        row += len(chunk)
