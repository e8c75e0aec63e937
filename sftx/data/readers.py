"""One file becomes rows, each with its line or row.

Text is read line by line in plain Python, so that rows of different shapes may stand side by side and an error knows
its line (Arrow's type inference rejects such files as a whole). Nothing is held but the row in hand: the size of a
file does not matter. parquet and Arrow are read a few rows at a time, without the copy that `datasets` would make.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from sftx.data.json_text import JsonText, limit
from sftx.errors import DataError, one_line
from sftx.types import Location

Rows: TypeAlias = Iterator[tuple[Location, Any]]

_PIECE_BYTES: Final = 2**16
_BATCH_ROWS: Final = 256

_LONE_RETURN: Final = re.compile(r"(?<=\r)(?!\n)")

# What a file of a wrong name begins with, and the name that it should have.
_MAGIC: Final = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".parquet": re.compile(rb"PAR1[\x00-\x1f]"),
    ".arrow": re.compile(rb"ARROW1\x00"),
}


@dataclass
class Skip:
    """How many rows are still to be passed over before the first is given: they were read in an earlier process.

    What is wrong with such a row was told then; it may go unseen.
    """

    left: int = 0

    def over(self, num: int) -> int:
        """How many of the next `num` rows are passed over."""
        passed = min(self.left, num)
        self.left -= passed
        return passed


def kind(file: Path) -> str | None:
    """The suffix that says how the file is read: `.jsonl` of `rows.jsonl.gz`. None for one of no known kind."""
    *others, suffix = ("", *(suffix.lower() for suffix in file.suffixes))
    if suffix in _COMPRESSED:
        return others[-1] if others and others[-1] in _TEXT else None
    return suffix if suffix in _TEXT or suffix in _BINARY else None


def known() -> str:
    """The suffixes of readable files, in words."""
    *most, last = _COMPRESSED
    return f"{', '.join(_TEXT)} (each also compressed: {', '.join(most)} or {last}), {', '.join(_BINARY)}"


def read(file: Path, path: str, skip: Skip) -> Rows:
    """The rows of a file of a known kind; errors and places call it `path`. Raises DataError."""
    suffix = kind(file)
    assert suffix is not None
    last = ""
    try:
        for where, row in (_TEXT | _BINARY)[suffix](file, path, skip):
            yield where, row
            last = f" after {where.unit} {where.number}"
    except DataError:
        raise
    except Exception as error:  # of the file system, or of a reader of somebody else's: gzip, zlib, lzma, Arrow
        raise DataError(f"{path}: cannot be read{last}: {one_line(error)}") from error


# --- text ---------------------------------------------------------------------------------------


def _open(file: Path) -> BinaryIO:
    module = _COMPRESSED.get(file.suffix.lower())
    stream: BinaryIO = (
        _open_zst(file) if module == "pyarrow" else importlib.import_module(module or "io").open(file, "rb")
    )
    return stream


def _open_zst(file: Path) -> BinaryIO:
    import pyarrow as pa  # type: ignore[import-untyped]

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))


def _texts(stream: Any, path: str, *, max_bytes: int = -1) -> Iterator[str]:
    """The lines of a file, or pieces of them of at most `max_bytes`. Raises DataError for what is not UTF-8."""
    start = stream.peek(10)
    for suffix, magic in _MAGIC.items():
        if magic.match(start):
            raise DataError(f"{path}: begins as a {suffix} file does; give it that name")
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, decoded = 1, 0
    while True:
        piece = stream.readline(max_bytes)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, final=max_bytes < 0 or not piece)
        except UnicodeDecodeError as error:
            at = decoded - held + error.start + 1
            raise DataError(f"{Location(path, line)}: is not UTF-8: {error.reason} at byte {at}") from None
        if not piece:
            return
        yield text
        line, decoded = (line + 1, 0) if piece.endswith(b"\n") else (line, decoded + len(piece))


def _read_lines(file: Path, path: str, skip: Skip) -> Rows:
    with _open(file) as stream:
        for number, line in enumerate(_texts(stream, path), 1):
            if line.strip() and not skip.over(1):
                where = Location(path, number)
                yield where, _loads(line, where)


def _loads(text: str, where: Location) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not readable JSON: {limit(error)}") from None


def _read_json(file: Path, path: str, skip: Skip) -> Rows:
    """A list of rows, decoded one by one; a file of this name that holds JSON lines is read as such."""
    with _open(file) as stream:
        text = JsonText(_texts(stream, path, max_bytes=_PIECE_BYTES), path)
        start = text.peek()
        if start == "[":
            yield from _items(text, skip)
            return
        if start == "{":
            where = text.where()
            with suppress(DataError):  # what is wrong is said better by the reader of lines
                text.value()
                if text.where() != where:
                    start = ""
            if not start:
                raise DataError(f"{where}: got one object over several lines, expected a list of objects or one a line")
    yield from _read_lines(file, path, skip)


def _items(text: JsonText, skip: Skip) -> Rows:
    text.skip()
    while text.peek() != "]":
        where, row = text.where(), text.value()
        if not skip.over(1):
            yield where, row
        if text.peek() == ",":
            text.skip()
        elif text.peek() != "]":
            raise DataError(f"{text.where()}: not valid JSON: expected ',' or ']' after a row")
    text.skip()
    if text.peek():
        raise DataError(f"{text.where()}: not valid JSON: text follows the list")


def _read_csv(file: Path, path: str, skip: Skip) -> Rows:
    """Every field is text: "042" and "NA" stay as they are. Blank lines are skipped."""
    # Not by datasets: pandas takes the first field for an index, in silence, when the rows have one more than the
    # header, and drops the second of two columns of one name.
    csv.field_size_limit(2**31 - 1)  # of the whole process; a document may be longer than the 128 KiB of the default
    with _open(file) as stream:
        reader = csv.reader(_csv_lines(_texts(stream, path)), strict=True)
        names: list[str] | None = None
        where = Location(path, 1)
        try:
            for row in reader:
                if not row:
                    pass
                elif names is None:
                    names = row
                    _check_names(names, str(where))
                elif len(row) != len(names):
                    raise DataError(f"{where}: got {len(row)} fields, expected the {len(names)} of the first line")
                elif not skip.over(1):
                    yield where, dict(zip(names, row, strict=True))
                where = Location(path, reader.line_num + 1)
        except csv.Error as error:
            raise DataError(f"{where}: not valid CSV: {error}") from None


def _csv_lines(lines: Iterable[str]) -> Iterator[str]:
    """A lone carriage return ends a line too."""
    for line in lines:
        if line.count("\r") == line.endswith("\r\n"):
            yield line
        else:
            yield from filter(None, _LONE_RETURN.split(line))


def _read_text(file: Path, path: str, skip: Skip) -> Rows:
    """The whole file is one document: `{"text": ...}`."""
    with _open(file) as stream:
        text = "".join(_texts(stream, path))
    if text.strip() and not skip.over(1):
        yield Location(path, 1), {"text": text}


# --- columns ------------------------------------------------------------------------------------


def _check_names(names: Sequence[str], who: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{who}: two columns have the same name: {', '.join(names)}")


def _read_parquet(file: Path, path: str, skip: Skip) -> Rows:
    import pyarrow.parquet  # type: ignore[import-untyped]

    # Without pre_buffer and with a buffer of its own, a page is in memory at a time, not a whole row group.
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as source:
        groups, before = list(range(source.num_row_groups)), 0
        while groups and (num_rows := source.metadata.row_group(groups[0]).num_rows) <= skip.left:
            before += skip.over(num_rows)
            groups.pop(0)
        batches = source.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
        yield from _rows(source.schema_arrow, batches, path, skip, before)


def _read_arrow(file: Path, path: str, skip: Skip) -> Rows:
    """Both forms: the stream that `datasets` writes, and the file that knows where its batches are."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(source)
        yield from _rows(reader.schema, batches, path, skip)


def _rows(schema: Any, batches: Iterable[Any], path: str, skip: Skip, number: int = 0) -> Rows:
    """The rows of Arrow's record batches as Python values, a few at a time; the first is the one after `number`."""
    _check_names(schema.names, path)
    decode = _json_decoder(schema)
    for batch in batches:
        passed = skip.over(batch.num_rows)
        number += passed
        if passed == batch.num_rows:
            continue
        batch.validate(full=True)  # damaged offsets would be followed to wherever they point
        for start in range(passed, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield Location(path, number, "row"), decode(row)


def _json_decoder(schema: Any) -> Callable[[Any], Any]:
    """Arrow keeps JSON of any shape, as `datasets` writes it for tools, as text that says that it is JSON."""
    if "extension<arrow.json>" not in str(schema):
        return lambda row: row
    from datasets import Features

    decode: Callable[[Any], Any] = Features.from_arrow_schema(schema).decode_example
    return decode


Reader: TypeAlias = Callable[[Path, str, Skip], Rows]

_COMPRESSED: Final = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}
"""Each suffix of a compressed file, and the module that opens it."""

_TEXT: Final[dict[str, Reader]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
}

_BINARY: Final[dict[str, Reader]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
