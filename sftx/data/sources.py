"""A file becomes records, each with its place.

JSON lines and JSON are read row by row in plain Python, so that rows of different shapes may stand side by side and an
error knows its line (Arrow's type inference rejects such files as a whole). parquet and CSV are read by `datasets`.
"""

from __future__ import annotations

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
    except RecursionError:
        raise DataError(f"{where}: not valid JSON: nested too deeply") from None


def _read_lines(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = Location(path, number)
                yield where, _loads(line, where)


def _read_json(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    """A list of rows, decoded one by one; a file of this name that holds JSON lines is read as such."""
    text = file.read_text(encoding="utf-8-sig")
    start = _skip_space(text, 0)
    if not text.startswith("[", start):
        yield from _read_lines(file, path)
        return
    decoder = json.JSONDecoder()
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
        except RecursionError:
            raise DataError(f"{where}: not valid JSON: nested too deeply") from None
        yield where, row
        at = _skip_space(text, at)
        if text.startswith(",", at):
            at = _skip_space(text, at + 1)
        elif not text.startswith("]", at):
            raise DataError(
                f"{Location(path, text.count(chr(10), 0, at) + 1)}: not valid JSON: expected ',' or ']' after a row"
            )


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _read_parquet(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    from datasets import Dataset

    yield from _rows(lambda: Dataset.from_parquet(str(file)), path)


def _read_csv(file: Path, path: str) -> Iterator[tuple[Location, Any]]:
    from datasets import Dataset

    # As text: pandas would make a number of the answer "042" and nothing of the answer "NA".
    yield from _rows(lambda: Dataset.from_csv(str(file), dtype=str, keep_default_na=False), path)


def _rows(open_dataset: Callable[[], Any], path: str) -> Iterator[tuple[Location, Any]]:
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    try:
        dataset = open_dataset()
    except Exception as error:  # a reader of somebody else's: pyarrow, pandas and datasets have roots of their own
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read: {type(cause).__name__}: {one_line(cause)}") from error
    finally:
        enable_progress_bar()
    for number, row in enumerate(dataset, 1):
        yield Location(path, number, "row"), row


_READERS: Final[dict[str, Callable[[Path, str], Iterator[tuple[Location, Any]]]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
