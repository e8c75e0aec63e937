"""The files that the bench reads and writes. Whatever is wrong with one is a BenchError of one line.

A result takes time to measure: where it goes is tried before, and what lies there stays until the new one is whole.
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
    """Tries whether all of them can be written, and makes their directories; what they hold stays.

    Raises:
        BenchError: one cannot, or is asked for twice.
    """
    for path in paths:
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[Path] = set()
    for path in paths:
        with _told(path):
            target = path.resolve()
            if target in seen and not _is_device(path):
                raise BenchError(f"{path}: asked for twice; each result needs a file of its own")
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
    """A file beside `path`, which takes its place once it is written."""
    with _told(path):
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
    """Or a pipe: there is nothing to be lost, and nothing may take its place."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BenchError(f"{path}: cannot be written: {error.strerror or error}") from error
