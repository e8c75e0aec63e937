"""These functions read and write the bench's files; an unusable one raises a BenchError of one line.

Results take time to measure, so their paths are checked before measuring, and written atomically.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from sftx_kernels.bench import BenchError


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: cannot be read: {error}") from error
    except RecursionError as error:
        raise BenchError(f"{path}: cannot be read: it is nested too deeply") from error


def probe(*paths: Path) -> None:
    """Check that all paths can be written, and make their directories; existing contents stay.

    Raises:
        BenchError: a path cannot be written, or is given twice.
    """
    for path in paths:
        with _as_bench_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[Path] = set()
    for path in paths:
        with _as_bench_error(path):
            target = path.resolve()
            if target in seen and not _is_device(path):
                raise BenchError(f"{path}: given twice; each result needs a file of its own")
            seen.add(target)
            if path.is_dir():
                raise IsADirectoryError(None, "it is a directory")
            if path.exists():
                path.open("a").close()
            if not _is_device(path):
                beside = _beside(target)
                beside.touch()
                beside.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Open a temporary file beside `path` that replaces it at the end (an atomic write)."""
    with _as_bench_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_device(path):
            with path.open("w", newline="", encoding="utf-8") as file:
                yield file
            return
        target = path.resolve()  # a link stays one
        beside = _beside(target)
        try:
            with beside.open("w", newline="", encoding="utf-8") as file:
                yield file
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """Return True for a device or a pipe, which is written directly: it has no contents, and must not be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


@contextlib.contextmanager
def _as_bench_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error
