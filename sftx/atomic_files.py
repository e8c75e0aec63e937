"""Files and directories that are there whole or not at all: written beside, brought to disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sftx.errors import OutputError, SftxError, one_line

CHECKSUMS: Final = "checksums.json"
_PART, _OLD = ".part", ".old"


def write_text(path: Path, text: str) -> None:
    """Puts `text` in place of what is there. Raises OutputError; the old content stands then."""
    part = path.with_name(f".{path.name}{_PART}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes one JSON object. Raises OutputError."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def directory(path: Path, *, checksums: bool = False) -> Iterator[Path]:
    """An empty neighbour to be filled, which takes the place of `path` at the end.

    With `checksums`, size and SHA-256 of every file are written into it last. Raises OutputError, for foreign errors
    of the body too, and nothing is left then but what was there before.
    """
    part, old = (path.with_name(f".{path.name}{suffix}") for suffix in (_PART, _OLD))
    try:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        made = [path.parent, *itertools.takewhile(lambda parent: not parent.exists(), path.parent.parents)]
        part.mkdir(parents=True)
        yield part
        files = [file for file in sorted(part.rglob("*")) if file.is_file()]
        if checksums:
            write_json(part / CHECKSUMS, {file.relative_to(part).as_posix(): _described(file) for file in files})
        for file in files:
            file.chmod(0o666 & ~_umask())  # safetensors writes for its owner alone
        for place in (*part.rglob("*"), part):
            _sync(place)
        if path.exists():
            path.rename(old)
        part.rename(path)
        for parent in made:
            _sync(parent)
    except SftxError:
        raise
    except Exception as error:  # a full disk is an OSError, a SafetensorError, or tokenizers' bare Exception
        raise OutputError(f"{path}: cannot be written: {one_line(error)}{_advice(error, path)}") from error
    finally:
        if not path.exists() and old.exists():
            old.rename(path)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a directory that was written with checksums; None when it is as it was written."""
    try:
        expected: dict[str, dict[str, Any]] = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        if not expected:
            return f"{CHECKSUMS} names no file"
        for name, described in expected.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != described["bytes"]:
                return f"{name} has {size} bytes, {described['bytes']} were written"
            if _sha256(file) != described["sha256"]:
                return f"{name} has another SHA-256 than was written"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"it cannot be read: {one_line(error)}"
    return None


def remove(path: Path) -> None:
    """Takes a directory away; when that is interrupted, what is left has another name."""
    gone = path.with_name(f".{path.name}{_OLD}")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    except OSError:
        return  # not ours to move; the disk is fuller than asked for, and nothing is wrong otherwise
    shutil.rmtree(gone, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes what interrupted writes and removals left in `parent`; brings back what stood in a place before."""
    for old in parent.glob(f".*{_OLD}"):
        name = old.name.removeprefix(".").removesuffix(_OLD)
        # Renamed away with its successor complete, and not yet in its place: either is good, and the old one is here.
        if (parent / f".{name}{_PART}").exists() and not (parent / name).exists():
            old.rename(parent / name)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for part in parent.glob(f".*{_PART}"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def _described(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _advice(error: BaseException, path: Path) -> str:
    """What to do where there is no room, of which safetensors and tokenizers tell in words alone."""
    number = getattr(error, "errno", None)
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not re.search(r"space|quota|too large", str(error)):
        return ""
    free = shutil.disk_usage(_existing(path)).free
    return f" ({free / 1e6:.0f} MB free there); make room, or keep fewer checkpoints with --save-total-limit"


def _umask() -> int:
    """What new files are not allowed; there is no way to only look."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _sync(path: Path) -> None:
    """Has the file, or a directory's entries, on disk, so that a rename that survives a power cut has content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
