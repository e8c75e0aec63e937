"""Read one file as rows, each with its line or row number.

Text files are read line by line in plain Python, so that rows with different fields can be in one file and every error
names its line (Arrow's type inference rejects such files as a whole). Only one row is held in memory at a time. parquet
and Arrow files are read a few rows at a time, without the copy that `datasets` would make.

Text is UTF-8 unless the run says otherwise or the file begins with the byte order mark of UTF-16 or UTF-32. What a
reader finds out by itself (a byte order mark, the delimiter of a CSV file) it logs in one line.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from sftx.data.json_text import DECODER, JsonText, limit, said
from sftx.errors import DataError, counted, one_line
from sftx.types import Location

log = logging.getLogger(__name__)

Rows: TypeAlias = Iterator[tuple[Location, Any]]

_PIECE_BYTES: Final = 2**16
_BATCH_ROWS: Final = 256

_LONE_RETURN: Final = re.compile(r"(?<=\r)(?!\n)")

_DELIMITERS: Final = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""The characters that may be taken for the delimiter of a file whose source names none."""
_NAMED_DELIMITER: Final = re.compile(r'"?sep=([^\w"])"?[\r\n]*')
"""The first line with which Excel names the delimiter of a file."""
_LONGEST_HEADER_CHARS: Final = 2**20

_BYTE_ORDER_MARKS: Final = {
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins as the mark of UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_WITHOUT_MARK: Final = {
    "utf-16-le": re.compile(rb"[^\0]\0[^\0]\0"),
    "utf-16-be": re.compile(rb"\0[^\0]\0[^\0]"),
    "utf-32-le": re.compile(rb"[^\0]\0\0\0"),
    "utf-32-be": re.compile(rb"\0\0\0[^\0]"),
}
"""The first bytes of a text that begins with ASCII characters and has no byte order mark."""
_OF_PAIRS: Final = ("gb18030", "cp932", "big5", "cp949")
"""Encodings of Chinese, Japanese and Korean text, in which a character is mostly a pair of bytes."""
_SAMPLE_BYTES: Final = 2**12

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


@dataclass(frozen=True)
class RowFile:
    """A file of rows, and how its text is read."""

    file: Path
    path: str
    """The name of the file in locations and errors."""
    encoding: str = "utf-8"
    delimiter: str | None = None
    """What separates the fields of a CSV file; None takes it from the first line."""

    def open_text(self) -> Any:
        """Open a text file for reading its text as UTF-8, decompressed. Raises DataError for another kind of file."""
        stream = self._open()
        try:
            encoding = self._encoding(stream)
            if encoding == "utf-8":
                return stream
            recoded = _RecodedStream(stream, encoding, self.path)
            return io.BufferedReader(recoded, _PIECE_BYTES)
        except BaseException:
            stream.close()
            raise

    def _open(self) -> Any:
        """Open the file for reading its bytes, decompressed."""
        module = _COMPRESSED.get(self.file.suffix.lower())
        if module == "pyarrow":
            import pyarrow as pa  # type: ignore[import-untyped]

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(self.file)), "zstd"))
        if module in ("bz2", "lzma"):
            return io.BufferedReader(_Decompressed(self.file, module), _PIECE_BYTES)
        return importlib.import_module(module or "io").open(self.file, "rb")

    def _encoding(self, stream: Any) -> str:
        """Return the encoding of an opened file, which its byte order mark may name. Raises DataError."""
        start = stream.peek(10)
        for suffix, magic in _MAGIC.items():
            if magic.match(start):
                raise DataError(f"{self.path}: begins as a {suffix} file does; give it that name")
        asked = codecs.lookup(self.encoding).name.removesuffix("-sig")
        marked = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
        if marked is None:
            if start and asked in ("utf-16", "utf-32"):
                raise DataError(f"{self.path}: has no byte order mark; write {asked}-le or {asked}-be as its encoding")
            likely = next((name for name, pattern in _WITHOUT_MARK.items() if pattern.match(start)), None)
            if likely is not None and asked == "utf-8":
                raise DataError(f"{self.path}: every other byte is 0, as in {likely}; {_say_encoding(likely)}")
            return asked
        if asked not in ("utf-8", marked, marked[:6]):
            raise DataError(
                f"{self.path}: begins with the byte order mark of {marked}, and its encoding is to be {self.encoding}; "
                f"{_say_encoding(marked)}"
            )
        if marked != asked:
            _log_once(str(self.file.absolute()), f"{self.path}: is read as {marked}, which its byte order mark names")
        return marked


def kind(file: Path) -> str | None:
    """Return the suffix that decides how a file is read (`.jsonl` for `rows.jsonl.gz`), or None for an unknown one."""
    *others, suffix = ("", *(suffix.lower() for suffix in file.suffixes))
    if suffix in _COMPRESSED:
        return others[-1] if others and others[-1] in _TEXT else None
    return suffix if suffix in _TEXT or suffix in _BINARY else None


def is_text(file: Path) -> bool:
    """Return whether a file of this name is text, which has an encoding."""
    return kind(file) in _TEXT


def known() -> str:
    """Return the suffixes of all readable files as text for an error."""
    *most, last = _COMPRESSED
    return f"{', '.join(_TEXT)} (each also compressed: {', '.join(most)} or {last}), {', '.join(_BINARY)}"


def read(source: RowFile, skip: Skip) -> Rows:
    """Yield the rows of a file of a known kind. Raises DataError."""
    suffix = kind(source.file)
    assert suffix is not None
    last = ""
    try:
        for where, row in (_TEXT | _BINARY)[suffix](source, skip):
            yield where, row
            last = f" after {where.unit} {where.number}"
    except DataError:
        raise
    except Exception as error:  # raised by the file system, gzip, zlib, lzma or Arrow
        raise DataError(f"{source.path}: cannot be read{last}: {one_line(error)}") from error


@cache
def _log_once(_file: str, message: str) -> None:
    """Log what a reader found out about a file, at the first of several readings in this process."""
    log.info("%s", message)


# --- text ---------------------------------------------------------------------------------------


class _Decompressed(io.RawIOBase):
    """A bz2 or xz file, which may be several streams one after the other.

    Python's own modules silently ignore what follows the first stream when it is damaged, and rows would vanish.
    """

    def __init__(self, file: Path, module: str) -> None:
        library = importlib.import_module(module)
        self._make: Callable[[], Any] = library.BZ2Decompressor if module == "bz2" else library.LZMADecompressor
        self._padding = b"" if module == "bz2" else b"\0"  # which xz allows between and after streams
        self._decompressor = self._make()
        self._file = file.open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            given = b""
            if self._decompressor.eof:
                given = self._decompressor.unused_data.lstrip(self._padding)
                while not given and (piece := self._file.read(_PIECE_BYTES)):
                    given = piece.lstrip(self._padding)
                if not given:
                    return 0
                self._decompressor = self._make()
            elif self._decompressor.needs_input and not (given := self._file.read(_PIECE_BYTES)):
                raise EOFError("it ends before the end of its compressed data")
            data = self._decompressor.decompress(given, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _RecodedStream(io.RawIOBase):
    """A text file of another encoding, read as UTF-8."""

    def __init__(self, stream: Any, encoding: str, path: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._encoding = encoding
        self._path = path
        self._line = 1
        self._num_read = 0
        self._ready = b""
        self._error: DataError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        is_end = False
        while not self._ready and not is_end:
            if self._error is not None:
                raise self._error
            piece = self._stream.read(_PIECE_BYTES)
            is_end = not piece
            held = self._decoder.getstate()
            try:
                text = self._decoder.decode(piece, is_end)
            except UnicodeDecodeError as error:
                # What comes before the wrong byte is read first, so that the error is that of its line.
                num_good = error.start - len(held[0])
                self._decoder.setstate(held)
                text = self._decoder.decode(piece[: max(0, num_good)])
                where = Location(self._path, self._line + text.count("\n"))
                at = self._num_read + num_good + 1
                self._error = DataError(f"{where}: is not {self._encoding}: {error.reason} at byte {at} of the file")
                is_end = False
            self._line += text.count("\n")
            self._num_read += len(piece)
            self._ready = text.encode("utf-8", "replace")
        num = min(len(buffer), len(self._ready))
        buffer[:num] = self._ready[:num]
        self._ready = self._ready[num:]
        return num

    def close(self) -> None:
        self._stream.close()
        super().close()


def _texts(stream: BinaryIO, path: str, *, max_bytes: int = -1) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, or pieces of them of at most `max_bytes`. Raises DataError for other bytes."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, decoded = 1, 0
    while True:
        piece = stream.readline(max_bytes)
        held = decoder.getstate()[0]
        try:
            text = decoder.decode(piece, final=max_bytes < 0 or not piece)
        except UnicodeDecodeError as error:
            at = decoded - len(held) + error.start + 1
            advice = _advise_encoding((held + piece)[error.start :] + stream.read(_SAMPLE_BYTES))
            raise DataError(f"{Location(path, line)}: is not UTF-8: {error.reason} at byte {at}; {advice}") from None
        if not piece:
            return
        yield text
        line, decoded = (line + 1, 0) if piece.endswith(b"\n") else (line, decoded + len(piece))


def _advise_encoding(sample: bytes) -> str:
    """Return the end of an error: which encodings `sample`, which begins with a byte that is not UTF-8, may have."""
    sample = sample[:_SAMPLE_BYTES]
    groups = re.findall(rb"[\x80-\xff]+", sample)
    others = b"".join(groups)
    likely = [*_OF_PAIRS, "cp1252"]
    if len(others) < 2 * len(groups):  # accented letters, which mostly stand alone
        likely = ["cp1252"]
    elif min(others) >= 0xC0:  # the Cyrillic letters
        likely = ["cp1251", "cp1252"]
    readings = []
    for encoding in likely:
        # The last character may be cut off.
        with suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
            shown = text.partition("\n")[0][:12].strip()
            if shown.isprintable():
                readings.append(f"{encoding} ({shown!r})")
    if len(readings) == 1:
        return f"it may be {readings[0]}: {_say_encoding(readings[0].split()[0])}"
    return (f"it may be {' or '.join(readings)}: " if readings else "") + _say_encoding("NAME")


def _say_encoding(encoding: str) -> str:
    return f"say so with --encoding {encoding}, or with `encoding` of the source"


def _read_lines(source: RowFile, skip: Skip) -> Rows:
    """Decode one row a line. A file with this suffix that holds a list of rows is read as a list."""
    with source.open_text() as stream:
        if stream.peek(16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _list_items(JsonText(_texts(stream, source.path, max_bytes=_PIECE_BYTES), source.path), skip)
            return
        for number, line in enumerate(_texts(stream, source.path), 1):
            if line.strip() and not skip.over(1):
                where = Location(source.path, number)
                yield where, _loads(line, where)


def _loads(text: str, where: Location) -> Any:
    try:
        return DECODER.decode(text.rstrip(" \t\r\n"))  # so that an error at the end has the column of this line
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {said(error)} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not readable JSON: {limit(error)}") from None


def _read_json(source: RowFile, skip: Skip) -> Rows:
    """Decode a list of rows one by one. A file with this suffix that holds JSON lines is read as JSON lines."""
    with source.open_text() as stream:
        text = JsonText(_texts(stream, source.path, max_bytes=_PIECE_BYTES), source.path)
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
    yield from _read_lines(source, skip)


def _list_items(text: JsonText, skip: Skip) -> Rows:
    """Decode the items of a list whose opening bracket comes next, maybe after white space."""
    text.peek()
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


def _read_csv(source: RowFile, skip: Skip) -> Rows:
    """Read every field as text: "042" and "NA" stay as they are. Blank lines are skipped."""
    # `datasets` is not used: its pandas reader silently takes the first field for an index when the rows have one field
    # more than the header, and drops the second of two columns with the same name.
    csv.field_size_limit(2**31 - 1)  # for the whole process; a document may be longer than the default of 128 KiB
    path = source.path
    with source.open_text() as stream:
        # A lone carriage return ends a line too.
        lines = chain.from_iterable(
            [line] if line.count("\r") == line.endswith("\r\n") else filter(None, _LONE_RETURN.split(line))
            for line in _texts(stream, path)
        )
        header = _header_lines(lines)
        delimiter = source.delimiter or _find_delimiter(header, source)
        reader = csv.reader(chain(header, lines), delimiter=delimiter, strict=True)
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
                    by = f", separated by {_DELIMITERS.get(delimiter, repr(delimiter))}"
                    raise DataError(
                        f"{where}: got {counted(len(row), 'field')}, expected the {len(names)} of the first line{by}; "
                        "quote a field that holds the delimiter or a line break"
                    )
                elif not skip.over(1):
                    yield where, dict(zip(names, row, strict=True))
                where = Location(path, reader.line_num + 1)
        except csv.Error as error:
            raise DataError(f"{where}: not valid CSV: {error}") from None


def _header_lines(lines: Iterator[str]) -> list[str]:
    """Take the lines up to the end of the first record, whose quoted fields may hold line breaks."""
    header: list[str] = []
    num_quotes = num_chars = 0
    for line in lines:
        header.append(line)
        num_quotes, num_chars = num_quotes + line.count('"'), num_chars + len(line)
        is_record = line.strip("\r\n") and num_quotes % 2 == 0 and not _NAMED_DELIMITER.fullmatch(line)
        if is_record or num_chars > _LONGEST_HEADER_CHARS:
            break
    return header


def _find_delimiter(header: list[str], source: RowFile) -> str:
    """Return the delimiter that divides the first record into the most fields, and log one that is not expected.

    csv.Sniffer is not used: it also looks at the rows, whose text it may take for anything. A line with which Excel
    names the delimiter is made blank.
    """
    expected = "\t" if kind(source.file) == ".tsv" else ","
    for at, line in enumerate(header):
        if named := _NAMED_DELIMITER.fullmatch(line):
            header[at] = "\n"
            return named[1]
    text = [line for line in header if line.strip("\r\n")]
    numbers = {mark: len(next(csv.reader(text, delimiter=mark), ())) for mark in (expected, *_DELIMITERS)}
    found = max(numbers, key=lambda mark: numbers[mark])  # the expected one where several are equal
    if found != expected:
        _log_once(
            str(source.file.absolute()),
            f"{source.path}: its fields are separated by {_DELIMITERS[found]}, going by its first line; `delimiter` of "
            "the source names another",
        )
    return found


def _read_text(source: RowFile, skip: Skip) -> Rows:
    """Read the whole file as one document: `{"text": ...}`."""
    with source.open_text() as stream:
        text = "".join(_texts(stream, source.path))
    if text.strip() and not skip.over(1):
        yield Location(source.path, 1), {"text": text}


# --- columns ------------------------------------------------------------------------------------


def _check_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{where}: two columns have the same name: {', '.join(name or repr(name) for name in names)}")


def _read_parquet(source: RowFile, skip: Skip) -> Rows:
    import pyarrow.parquet  # type: ignore[import-untyped]

    # Without pre_buffer and with an own buffer, one page is in memory at a time instead of a whole row group.
    with pyarrow.parquet.ParquetFile(source.file, pre_buffer=False, buffer_size=2**20) as table:
        groups, before = list(range(table.num_row_groups)), 0
        while groups and (num_rows := table.metadata.row_group(groups[0]).num_rows) <= skip.left:
            before += skip.over(num_rows)
            groups.pop(0)
        batches = table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
        yield from _rows(table.schema_arrow, batches, source.path, skip, before)


def _read_arrow(source: RowFile, skip: Skip) -> Rows:
    """Read both Arrow formats: the stream, which `datasets` writes, and the file, which has an index of its batches."""
    import pyarrow as pa

    with pa.OSFile(str(source.file)) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(stream)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader = pa.ipc.open_stream(stream)
        yield from _rows(reader.schema, batches, source.path, skip)


def _rows(schema: Any, batches: Iterable[Any], path: str, skip: Skip, number: int = 0) -> Rows:
    """Yield the rows of Arrow's record batches as Python values, a few at a time; `number` rows come before them."""
    _check_names(schema.names, path)
    remove_padding, decode = padding_remover(schema), _json_decoder(schema)
    for batch in batches:
        skipped = skip.over(batch.num_rows)
        number += skipped
        if skipped == batch.num_rows:
            continue
        batch.validate(full=True)  # otherwise damaged offsets would be read as addresses
        for start in range(skipped, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield Location(path, number, "row"), decode(remove_padding(row))


def _json_decoder(schema: Any) -> Callable[[Any], Any]:
    """Return a function that decodes Arrow's JSON extension type, in which `datasets` stores tools as text."""
    if "extension<arrow.json>" not in str(schema):
        return lambda row: row
    from datasets import Features

    decode: Callable[[Any], Any] = Features.from_arrow_schema(schema).decode_example
    return decode


def padding_remover(schema: Any) -> Callable[[Any], Any]:
    """Return a function that removes from a row the keys that only Arrow gave to its objects.

    Arrow gives every object of a column the keys of all others, with a null. A null is taken for such padding if other
    rows have a value there, or if the object lacks any other key in this way. A key that is null in all rows was
    written by somebody, and is kept in objects that have all other keys. Columns themselves are kept.
    """
    columns = {
        name: remove for name, type_ in zip(schema.names, schema.types, strict=True) if (remove := _remover(type_))
    }
    if not columns:
        return lambda row: row
    return lambda row: {name: columns[name](value) if name in columns else value for name, value in row.items()}


def _remover(type_: Any) -> Callable[[Any], Any] | None:
    """Return the function for the values of one Arrow type, or None for a type that holds no objects."""
    import pyarrow as pa

    if pa.types.is_struct(type_):
        inner = {field.name: _remover(field.type) for field in type_}
        always_null = {field.name for field in type_ if pa.types.is_null(field.type)}

        def remove(value: Any) -> Any:
            if not isinstance(value, dict):  # null, or an image that `datasets` decoded
                return value
            is_padded = any(item is None and key not in always_null for key, item in value.items())
            return {
                key: of_key(item) if (of_key := inner.get(key)) else item
                for key, item in value.items()
                if item is not None or (key in always_null and not is_padded)
            }

        return remove
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    of_item = _remover(type_.value_type) if is_list else None
    if of_item is None:
        return None
    return lambda value: [of_item(item) for item in value] if isinstance(value, list) else value


Reader: TypeAlias = Callable[[RowFile, Skip], Rows]

_COMPRESSED: Final = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}
"""The module that opens each kind of compressed file."""

_TEXT: Final[dict[str, Reader]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}

_BINARY: Final[dict[str, Reader]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
