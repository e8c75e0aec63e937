"""A file becomes records, each with its place.

JSON lines, JSON and CSV are read row by row in plain Python, so that rows of different shapes may stand side by side
and an error knows its line (Arrow's type inference rejects such files as a whole). parquet is read by `datasets`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from sftx.errors import DataError, one_line
from sftx.types import Location, Record

SHIPPED: Final = "sftx:"
"""A path that starts so names a file of this package: `sftx:demo/train.jsonl`."""

_SPACE = re.compile(r"[ \t\r\n]*")


def resolve(path: str) -> Path:
    """The file that `path` names. Raises DataError when there is none."""
    package = Path(__file__).parent.parent
    file = package / path.removeprefix(SHIPPED) if path.startswith(SHIPPED) else Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"{path}: is a directory; name a file (.jsonl, .json, .parquet or .csv)")
    if not file.exists():
        raise DataError(
            f"{path}: no such file (looked in {Path.cwd()})" if not file.is_absolute() else f"{path}: no such file"
        )
    return file


def sha256(path: str) -> str:
    """Hash of the file's bytes, in hexadecimal."""
    with resolve(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str) -> Iterator[tuple[Location, Record]]:
    """The records of one file in their order, with their places. Raises DataError: no file, no rows, not readable."""
    file = resolve(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file {file.suffix!r}; known are {', '.join(_READERS)}")
    empty = True
    try:
        for where, row in reader(file, path):
            empty = False
            if not isinstance(row, dict):
                raise DataError(
                    f'{where}: got a {type(row).__name__}, expected an object such as {{"messages": [...]}}'
                )
            yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if empty:
        raise DataError(f"{path}: holds no rows")


def _loads(text: str, where: Location) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not readable JSON: {_limit(error)}") from None


def _limit(error: RecursionError | ValueError) -> str:
    """What valid JSON was too much for Python's reader."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def _read_lines(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    with file.open("rb") as lines:  # decoded line by line, so that a wrong byte has its line too
        for number, line in enumerate(lines, 1):
            where = Location(path, number)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: is not UTF-8: {error.reason} at byte {error.start + 1}") from None
            if text.strip():
                yield where, _loads(text, where)


def _read_json(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    """A list of rows, decoded one by one; a file of this name that holds JSON lines is read as such."""
    text = file.read_text(encoding="utf-8-sig")
    start = _skip_space(text, 0)
    decoder = json.JSONDecoder()
    if not text.startswith("[", start):
        if text.startswith("{", start) and "\n" in text[start : _end_of_value(decoder, text, start)]:
            where = Location(path, text.count("\n", 0, start) + 1)
            raise DataError(f"{where}: got one object over several lines, expected a list of objects or one a line")
        yield from _read_lines(file, path)
        return
    at, line, counted = _skip_space(text, start + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        where = Location(path, line)
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{Location(path, error.lineno)}: not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: not readable JSON: {_limit(error)}") from None
        yield where, row
        at = _skip_space(text, at)
        if text.startswith(",", at):
            at = _skip_space(text, at + 1)
        elif not text.startswith("]", at):
            raise DataError(
                f"{Location(path, text.count(chr(10), 0, at) + 1)}: not valid JSON: expected ',' or ']' after a row"
            )
    at = _skip_space(text, at + 1)
    if at < len(text):
        where = Location(path, text.count("\n", 0, at) + 1)
        raise DataError(f"{where}: not valid JSON: text follows the list")


def _end_of_value(decoder: json.JSONDecoder, text: str, start: int) -> int:
    """Where the JSON value ends that begins at `start`; at `start` when it is not valid."""
    try:
        return decoder.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return start


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _read_parquet(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets import Dataset
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would log the error that is raised below
    logging.disable_progress_bar()
    try:
        if pyarrow.parquet.read_metadata(file).num_rows == 0:
            return  # datasets has no word for it
        dataset = Dataset.from_parquet(str(file))
    except Exception as error:  # a reader of somebody else's: pyarrow and datasets have roots of their own
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read: {type(cause).__name__}: {one_line(cause)}") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    for number, row in enumerate(dataset, 1):
        yield Location(path, number, "row"), row


def _read_csv(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    """Every field is text: "042" and "NA" stay as they are. Blank lines are skipped."""
    # Not by datasets: pandas takes the first field for an index, in silence, when the rows have one more than the
    # header, and drops the second of two columns of one name.
    csv.field_size_limit(2**31 - 1)  # of the whole process; a document may be longer than the 128 KiB of the default
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        names: list[str] | None = None
        where = Location(path, 1)
        try:
            for row in reader:
                if not row:
                    pass
                elif names is None:
                    names = row
                    if len(set(names)) < len(names):
                        raise DataError(f"{where}: two columns have the same name: {', '.join(names)}")
                elif len(row) != len(names):
                    raise DataError(f"{where}: got {len(row)} fields, expected the {len(names)} of the first line")
                else:
                    yield where, dict(zip(names, row, strict=True))
                where = Location(path, reader.line_num + 1)
        except csv.Error as error:
            raise DataError(f"{where}: not valid CSV: {error}") from None


_READERS: Final[dict[str, Callable[[Path, str], Iterator[tuple[Location, Any]]]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
