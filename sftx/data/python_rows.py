"""Rows that are given in Python become files in the cache directory, named after their content.

From there on they are a source like any other: an error names a file and a line that can be opened, the manifest has
their hash, a run resumes on them, and the run file that a run writes works on the command line.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sftx import atomic_files, paths
from sftx.errors import DataError, one_line


def save_rows(rows: Any, name: str) -> Path:
    """Write rows to the cache directory and return the path of the file, or of the saved dataset.

    `rows` is an iterable of mappings, which is read once and to its end, a dataset with a length and an index as torch
    has them, or a `datasets.Dataset`, which is kept in its own format. `name` is what an error calls it. Raises
    DataError for rows that are no JSON objects, and when the iterable raises; OutputError.
    """
    directory = paths.cache_dir() / "rows"
    if hasattr(rows, "save_to_disk"):
        if isinstance(rows, Mapping):
            raise DataError(f"{name}: holds several splits ({', '.join(map(str, rows))}); give one of them")
        if not len(rows):
            raise DataError(f"{name}: holds no rows")
        saved = directory / str(rows._fingerprint)
        if not saved.exists():
            with atomic_files.atomic_directory(saved) as part:
                rows.save_to_disk(str(part))
        return saved
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # iterating over it gives the names of its columns
        raise DataError(f"{name}: is a {type(rows).__name__}; give datasets.Dataset.from_pandas(...) of it")
    if not isinstance(rows, Iterable) and hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        rows = map(rows.__getitem__, range(len(rows)))
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"{name}: is of type {type(rows).__name__}; expected a path, a list of paths, rows as dicts, or a "
            "datasets.Dataset"
        )
    directory.mkdir(parents=True, exist_ok=True)
    unnamed = directory / f"{uuid.uuid4().hex}.jsonl"
    digest = hashlib.sha256()
    number = -1
    with atomic_files.open_bytes(unnamed) as file:
        for number, row in enumerate(_raising_data_errors(rows, name)):
            line = _line(row, f"{name}[{number}]")
            digest.update(line)
            file.write(line)
        if number < 0:
            raise DataError(f"{name}: holds no rows")
    return unnamed.replace(directory / f"{digest.hexdigest()[:16]}.jsonl")


def _raising_data_errors(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the rows; what the iterable raises is the cause of a DataError that names the row."""
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:
        raise DataError(f"{name}[{number}]: raised {type(error).__name__}: {one_line(error)}") from error


def _line(row: Any, where: str) -> bytes:
    if not isinstance(row, Mapping):
        raise DataError(f'{where}: is of type {type(row).__name__}; expected a dict such as {{"messages": [...]}}')
    try:
        text = json.dumps(dict(row), ensure_ascii=False, default=_json_value)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {one_line(error)}; a row holds what JSON has: text, numbers, lists, dicts") from None
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def _json_value(value: Any) -> Any:
    """Return a value that JSON lacks as one that it has: arrays and scalars of numpy and torch, and mappings."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"holds a value of type {type(value).__name__}")
