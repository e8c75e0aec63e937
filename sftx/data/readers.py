"""Read one file as rows, each with its line or row number.

Text files are read line by line in plain Python, so that rows with different fields can be in one file and every error
names its line (Arrow's type inference rejects such files as a whole). Only one row is held in memory at a time. parquet
and Arrow files are read a few rows at a time, without the copy that `datasets` would make.
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
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from sftx.data.json_text import JsonText, limit
from sftx.errors import DataError, one_line
from sftx.types import Location

Rows: TypeAlias = Iterator[tuple[Location, Any]]

_PIECE_BYTES: Final = 2**16
_BATCH_ROWS: Final = 256

_LONE_RETURN: Final = re.compile(r"(?<=\r)(?!\n)")

_MAGIC: Final = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    ".parquet": re.compile(rb"PAR1[\x00-\x1f]"),
    ".arrow": re.compile(rb"ARROW1\x00"),
}
"""First bytes of the binary formats, to tell the right suffix for a binary file with the suffix of a text file."""


@dataclass
class Skip:
    """Counts the rows that are still to be skipped because the run read them before it was resumed.

    A skipped row need not be valid: the run reported its errors then.
    """

    left: int = 0

    def over(self, num: int) -> int:
        """Skip as many of the next `num` rows as are left to skip, and return how many these are."""
        skipped = min(self.left, num)
        self.left -= skipped
        return skipped


def kind(file: Path) -> str | None:
    """Return the suffix that decides how a file is read (`.jsonl` for `rows.jsonl.gz`), or None for an unknown one."""
    *others, suffix = ("", *(suffix.lower() for suffix in file.suffixes))
    if suffix in _COMPRESSED:
        return others[-1] if others and others[-1] in _TEXT else None
    return suffix if suffix in _TEXT or suffix in _BINARY else None


def known() -> str:
    """Return the suffixes of all readable files as text for an error."""
    *most, last = _COMPRESSED
    return f"{', '.join(_TEXT)} (each also compressed: {', '.join(most)} or {last}), {', '.join(_BINARY)}"


def read(file: Path, path: str, skip: Skip) -> Rows:
    """Yield the rows of a file of a known kind. Locations and errors name it `path`. Raises DataError."""
    suffix = kind(file)
    assert suffix is not None
    last = ""
    try:
        for where, row in (_TEXT | _BINARY)[suffix](file, path, skip):
            yield where, row
            last = f" after {where.unit} {where.number}"
    except DataError:
        raise
    except Exception as error:  # raised by the file system, gzip, zlib, lzma or Arrow
        raise DataError(f"{path}: cannot be read{last}: {one_line(error)}") from error


# --- text ---------------------------------------------------------------------------------------


def _open(file: Path) -> BinaryIO:
    """Open a text file for reading its bytes, decompressed."""
    module = _COMPRESSED.get(file.suffix.lower())
    if module == "pyarrow":
        import pyarrow as pa  # type: ignore[import-untyped]

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))
    stream: BinaryIO = importlib.import_module(module or "io").open(file, "rb")
    return stream


def _texts(stream: Any, path: str, *, max_bytes: int = -1) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, or pieces of them of at most `max_bytes`. Raises DataError for other bytes."""
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
        return json.loads(text.rstrip(" \t\r\n"))  # so that an error at the end has the column of this line
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not readable JSON: {limit(error)}") from None


def _read_json(file: Path, path: str, skip: Skip) -> Rows:
    """Decode a list of rows one by one. A file with this suffix that holds JSON lines is read as JSON lines."""
    with _open(file) as stream:
        text = JsonText(_texts(stream, path, max_bytes=_PIECE_BYTES), path)
        start = text.peek()
        if start == "[":
            yield from _list_items(text, skip)
            return
        if start == "{":
            where = text.where()
            with suppress(DataError):  # the reader of lines reports the error better
                text.value()
                if text.where() != where:
                    start = ""
            if not start:
                raise DataError(f"{where}: got one object over several lines, expected a list of objects or one a line")
    yield from _read_lines(file, path, skip)


def _list_items(text: JsonText, skip: Skip) -> Rows:
    """Decode the items of a list whose opening bracket comes next."""
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
    """Read every field as text: "042" and "NA" stay as they are. Blank lines are skipped."""
    # `datasets` is not used: its pandas reader silently takes the first field for an index when the rows have one field
    # more than the header, and drops the second of two columns with the same name.
    csv.field_size_limit(2**31 - 1)  # for the whole process; a document may be longer than the default of 128 KiB
    with _open(file) as stream:
        # A lone carriage return ends a line too.
        lines = chain.from_iterable(
            [line] if line.count("\r") == line.endswith("\r\n") else filter(None, _LONE_RETURN.split(line))
            for line in _texts(stream, path)
        )
        reader = csv.reader(lines, strict=True)
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


def _read_text(file: Path, path: str, skip: Skip) -> Rows:
    """Read the whole file as one document: `{"text": ...}`."""
    with _open(file) as stream:
        text = "".join(_texts(stream, path))
    if text.strip() and not skip.over(1):
        yield Location(path, 1), {"text": text}


# --- columns ------------------------------------------------------------------------------------


def _check_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{where}: two columns have the same name: {', '.join(names)}")


def _read_parquet(file: Path, path: str, skip: Skip) -> Rows:
    import pyarrow.parquet  # type: ignore[import-untyped]

    # Without pre_buffer and with an own buffer, one page is in memory at a time instead of a whole row group.
    with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as source:
        groups, before = list(range(source.num_row_groups)), 0
        while groups and (num_rows := source.metadata.row_group(groups[0]).num_rows) <= skip.left:
            before += skip.over(num_rows)
            groups.pop(0)
        batches = source.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
        yield from _rows(source.schema_arrow, batches, path, skip, before)


def _read_arrow(file: Path, path: str, skip: Skip) -> Rows:
    """Read both Arrow formats: the stream, which `datasets` writes, and the file, which has an index of its batches."""
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
    """Yield the rows of Arrow's record batches as Python values, a few at a time; `number` rows come before them."""
    _check_names(schema.names, path)
    decode = _json_decoder(schema)
    for batch in batches:
        skipped = skip.over(batch.num_rows)
        number += skipped
        if skipped == batch.num_rows:
            continue
        batch.validate(full=True)  # otherwise damaged offsets would be read as addresses
        for start in range(skipped, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield Location(path, number, "row"), decode(row)


def _json_decoder(schema: Any) -> Callable[[Any], Any]:
    """Return a function that decodes Arrow's JSON extension type, in which `datasets` stores tools as text."""
    if "extension<arrow.json>" not in str(schema):
        return lambda row: row
    from datasets import Features

    decode: Callable[[Any], Any] = Features.from_arrow_schema(schema).decode_example
    return decode


Reader: TypeAlias = Callable[[Path, str, Skip], Rows]

_COMPRESSED: Final = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}
"""The module that opens each kind of compressed file."""

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
