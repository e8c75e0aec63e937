"""Atomic writes: a file or a directory is written beside its place, flushed to disk and then renamed into it.

A reader therefore finds the old content or the new one and never a part of it, even after a crash or a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

from sftx.errors import OutputError, SftxError, one_line

CHECKSUMS: Final = "checksums.json"
"""The file of a directory that was written with checksums: the size and the SHA-256 of every other file."""

_PART, _OLD = ".part", ".old"


def open_text(path: Path, *, errors: str = "strict", overwrite: bool = True) -> AbstractContextManager[TextIO]:
    """Open a UTF-8 text file that replaces `path` when the body ends without an error.

    `errors` is that of `open`: it decides what is written for a lone surrogate. Raises OutputError for an OSError, also
    one of the body, and for an existing file unless `overwrite`; the old content is kept then.
    """
    return _open(path, overwrite=overwrite, mode="w", encoding="utf-8", errors=errors, newline="\n")


def open_bytes(path: Path) -> AbstractContextManager[BinaryIO]:
    """Open a binary file that replaces `path` when the body ends without an error. Raises OutputError."""
    return _open(path, overwrite=True, mode="wb")


@contextmanager
def _open(path: Path, *, overwrite: bool, **options: Any) -> Iterator[Any]:
    # Where nothing is overwritten, each of two processes that write the same file has a part of its own.
    part = path.with_name(f".{path.name}{_PART}" if overwrite else f".{path.name}.{os.getpid()}{_PART}")
    try:
        with part.open(**options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        part.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {_reason(error, part, path)}") from error
    finally:
        with suppress(OSError):  # a read-only file system refuses even the removal of nothing
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`. Raises OutputError; the old content is kept then."""
    with open_text(path) as file:
        file.write(text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace the content of `path` by one JSON object. Raises OutputError; the old content is kept then."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(path: Path, *, checksums: bool = False) -> Iterator[Path]:
    """Yield an empty directory to write to, which replaces `path` when the body ends without an error.

    With `checksums`, the size and the SHA-256 of every file are written into it last. Raises OutputError, also for an
    exception of the body that is no SftxError; whatever is raised, `path` is left as it was.
    """
    part, old = (path.with_name(f".{path.name}{suffix}") for suffix in (_PART, _OLD))
    try:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new_parents = [path.parent, *itertools.takewhile(lambda parent: not parent.exists(), path.parent.parents)]
        part.mkdir(parents=True)
        yield part
        files = [file for file in sorted(part.rglob("*")) if file.is_file()]
        if checksums:
            sums = {
                file.relative_to(part).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
                for file in files
            }
            write_json(part / CHECKSUMS, sums)
        for file in files:
            file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        for entry in (*part.rglob("*"), part):
            _sync(entry)
        if path.exists():
            path.rename(old)
        part.rename(path)
        for parent in new_parents:
            _sync(parent)
    except SftxError:
        raise
    except Exception as error:  # a full disk is an OSError, a SafetensorError, or tokenizers' bare Exception
        reason = _reason(error, part, path)
        raise OutputError(f"{path}: cannot be written: {reason}{_advice(error, path)}") from error
    finally:
        if not os.path.exists(path) and os.path.exists(old):  # unlike Path.exists, False for a name that is too long
            old.rename(path)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a directory that was written with checksums, None when every file is intact."""
    try:
        expected: dict[str, dict[str, Any]] = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        if not expected:
            return f"{CHECKSUMS} names no file"
        for name, written in expected.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != written["bytes"]:
                return f"{name} has {size} bytes, {written['bytes']} were written"
            if sha256_of_file(file) != written["sha256"]:
                return f"{name} has another SHA-256 than was written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"it cannot be read: {one_line(error)}"
    return None


def remove(path: Path) -> None:
    """Remove a directory. When that is interrupted, the rest has another name, which `remove_leftovers` knows."""
    renamed = path.with_name(f".{path.name}{_OLD}")
    try:
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
    except OSError:
        return  # no permission: the disk is fuller than the user asked for, which is no reason to end a run
    shutil.rmtree(renamed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what interrupted writes and removals left in `parent`, and restore directories that they moved away."""
    for old in parent.glob(f".*{_OLD}"):
        name = old.name.removeprefix(".").removesuffix(_OLD)
        # Crash between the two renames: the new directory is complete but not moved in. Restore the old one.
        if (parent / f".{name}{_PART}").exists() and not (parent / name).exists():
            old.rename(parent / name)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for part in parent.glob(f".*{_PART}"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException, part: Path, path: Path) -> str:
    """Return the reason of an error; the place at which the content is made until it is complete is not named."""
    if isinstance(error, OSError) and error.strerror and error.filename in (None, str(part)):
        return error.strerror
    return one_line(error).replace(str(part), str(path))


def _advice(error: BaseException, path: Path) -> str:
    """Return what to do about a full disk, which safetensors and tokenizers report by their message alone."""
    number = getattr(error, "errno", None)
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not re.search(r"space|quota|too large", str(error)):
        return ""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    return f" ({free / 1e6:.0f} MB free there); make room, or keep fewer checkpoints with --save-total-limit"


def _umask() -> int:
    """Return the process's umask, which the system tells only while setting another one."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk, so that a rename never survives without its content."""
    is_directory = path.is_dir()
    if is_directory and not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)  # Windows flushes what can be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
