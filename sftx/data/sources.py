"""A source becomes records, each with its place: a file, a directory of files, a saved dataset, a hub dataset."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sftx.atomic_files import sha256_of_file
from sftx.config.options import RunConfig, Source
from sftx.data import hub, readers
from sftx.errors import ConfigError, DataError, did_you_mean, one_line
from sftx.types import Location, Record

SHIPPED: Final = "sftx:"
"""A path that starts so names a file of this package: `sftx:demo/train.jsonl`."""

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
# Files that describe a dataset and hold none of its rows.
_DESCRIPTIONS: Final = frozenset({"dataset_info.json", "dataset_infos.json"})
_SPLIT: Final = re.compile(
    r"(train|validation|valid|val|dev|test|eval)(ing|uation)?([-_.]\d+)?(-of-\d+)?", re.IGNORECASE
)
_MOST_SHOWN: Final = 5
_DEEPEST: Final = 100
_GLANCE_BYTES: Final = 2**20


def check_data_config(config: RunConfig) -> None:
    """Check the options of `data` without reading rows or importing torch. Raises ConfigError, DataError."""
    if not config.data.train:
        raise ConfigError("option 'data.train': no training data; give a file with --data")
    for source in (*config.data.train, *config.data.eval):
        check(source)
    if not config.data.streaming:
        return
    if config.train.max_steps is None:
        raise ConfigError("option 'data.streaming': a stream has no end; say how many steps with --max-steps")
    filters = [config.data.filters, *(source.filters for source in config.data.train if source.filters is not None)]
    if any(one.duplicates == "drop" for one in filters):
        raise ConfigError("option 'data.streaming': filters.duplicates=drop needs all rows; leave one of them out")


def check(source: Source) -> None:
    """Whether there is something to read. Reads nothing and imports nothing. Raises DataError, ConfigError."""
    place = _locate(source.path)
    if place is not None and place.is_dir() and hub.is_saved(place):
        if source.subset is not None:
            raise ConfigError(f"{source.path}: is a saved dataset, which has no subsets; leave {source.subset!r} out")
        return
    if place is None or (place.is_dir() and _is_split(source)):
        return
    for option in ("split", "subset"):
        if (value := getattr(source, option)) is not None and place.is_file():
            raise ConfigError(
                f"{source.path}: is a file, and {option} {value!r} is for datasets; leave it out, or name the "
                "directory that holds the splits"
            )
    for file, path in _files(place, source.path):
        if not os.access(file, os.R_OK):
            raise DataError(f"{path}: cannot be read: permission denied")


def read(source: Source, *, streaming: bool = False, start: int = 0) -> Iterator[tuple[Location, Record]]:
    """The records in their order; one is held at a time. Raises DataError: no rows, or rows that cannot be read.

    `streaming` only concerns hub datasets, which are then not downloaded as a whole. The first `start` records, which
    were read before, are passed over; there being fewer is an error.
    """
    check(source)
    empty = start == 0
    rest = None if source.limit is None else max(0, source.limit - start)
    for where, row in islice(_rows(source, start, streaming=streaming), rest):
        empty = False
        if not isinstance(row, dict):
            raise DataError(f'{where}: got a {type(row).__name__}, expected an object such as {{"messages": [...]}}')
        yield where, row
    if empty:
        raise DataError(f"{source.path}: holds no rows")


def mapped(row: Record, columns: Mapping[str, str], where: Location) -> Record:
    """The record that `columns` describe, its fields by the columns that hold them; the row itself without any.

    Raises DataError for a column that is not there.
    """
    return {field: _lookup(row, column, where) for field, column in columns.items()} if columns else row


def fingerprint(source: Source) -> str:
    """SHA-256, in hexadecimal, of all that decides what `read` gives. Raises DataError.

    Of a file alone it is that of its bytes, as `sha256sum` prints it; of a hub dataset it stands on the commit.
    """
    check(source)
    place = _locate(source.path)
    if place is None:
        content: Any = hub.hub_fingerprint(source)
    else:
        content = []
        for name, file in _contents(source, place):
            try:
                status = file.stat()
                digest = _sha256_of_unchanged(
                    file, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
                )
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {one_line(error)}") from error
            content.append((name, digest))
    options = {name: getattr(source, name) for name in ("columns", "subset", "split", "limit")}
    if place is not None and place.is_file() and not any(options.values()):
        return str(content[0][1])
    return hashlib.sha256(json.dumps([content, options], sort_keys=True).encode()).hexdigest()


def glance(source: Source) -> str:
    """SHA-256 of the files' sizes, first and last MiB: what tells most other data apart without reading them whole.

    Of a hub dataset its commit. Raises DataError.
    """
    check(source)
    place = _locate(source.path)
    if place is None:
        return hub.hub_fingerprint(source)
    hashed = hashlib.sha256()
    for name, file in _contents(source, place):
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            hashed.update(f"{name} {size}\n".encode())
            for start in (0, max(0, size - _GLANCE_BYTES)):
                stream.seek(start)
                hashed.update(stream.read(_GLANCE_BYTES))
    return hashed.hexdigest()


def num_bytes(source: Source) -> int:
    """Size of the files as they lie, compressed or not; 0 for a hub dataset. Raises DataError."""
    place = _locate(source.path)
    return 0 if place is None else sum(file.stat().st_size for _, file in _contents(source, place))


def resolve(path: str) -> Path:
    """The file or directory that `path` names. Raises DataError when there is none."""
    place = _path(path)
    try:
        if place.exists():
            return place
        dangling = place.is_symlink()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if dangling:
        raise DataError(f"{path}: is a link to {os.readlink(place)}, which is not there")
    raise DataError(f"{path}: no such file" + ("" if place.is_absolute() else f" (looked in {Path.cwd()})"))


# --- places -------------------------------------------------------------------------------------


def _path(path: str) -> Path:
    if path.startswith(SHIPPED):
        return Path(__file__).parent.parent / path.removeprefix(SHIPPED)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def _locate(path: str) -> Path | None:
    """The file or directory; None when it can only be a hub dataset. Raises DataError."""
    like_a_file = path.startswith(".") or readers.kind(Path(path)) is not None
    if _HUB_ID.fullmatch(path) and not like_a_file and not os.path.lexists(path):
        return None
    return resolve(path)


def _is_split(source: Source) -> bool:
    return source.split is not None or source.subset is not None


def _files(place: Path, path: str) -> list[tuple[Path, str]]:
    """The files of rows at `place`, sorted by path, with what to call them. Raises DataError."""
    if not place.is_dir():
        _check_file(place, path)
        return [(place, path)]
    found = sorted((file.relative_to(place).as_posix(), file) for file in _walk(place, set()))
    files = [(file, f"{path.rstrip('/')}/{name}") for name, file in found if _is_data(file)]
    if not files:
        names = ", ".join(name for name, _ in found[:_MOST_SHOWN]) + (", ..." if len(found) > _MOST_SHOWN else "")
        raise DataError(
            f"{path}: no file of rows is in this directory, which holds {names or 'nothing'}; known are "
            f"{readers.known()}"
        )
    _check_splits([name for name, file in found if _is_data(file)], path)
    for file, name in files:
        _check_file(file, name)
    return files


def _is_data(file: Path) -> bool:
    return readers.kind(file) is not None and file.name not in _DESCRIPTIONS


def _check_file(file: Path, path: str) -> None:
    if not file.is_file():
        what = f"a link to {os.readlink(file)}, which is not there" if not file.exists() else "no regular file"
        raise DataError(f"{path}: is {what}")
    if readers.kind(file) is None:
        raise DataError(f"{path}: unknown kind of file {file.suffix!r}; known are {readers.known()}")


def _check_splits(names: list[str], path: str) -> None:
    """Held-out rows are not to be trained on because they lie beside the others. Raises DataError."""
    splits = {}
    for name in names:
        for part in name.split("/"):
            if match := _SPLIT.fullmatch(part.partition(".")[0]):
                splits[match[1].lower()] = name
    if len(splits) > 1:
        raise DataError(
            f"{path}: holds several splits ({', '.join(sorted(splits.values()))}); choose one with split: NAME, or "
            "name the files"
        )


def _walk(directory: Path, seen: set[tuple[int, int]], depth: int = 0) -> Iterator[Path]:
    """Every file below `directory` but hidden ones; a directory that links lead to twice is read once."""
    try:
        status = directory.stat()
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {one_line(error)}") from error
    if (status.st_dev, status.st_ino) in seen:
        return
    if depth > _DEEPEST:
        raise DataError(f"{directory}: lies more than {_DEEPEST} directories deep; name one nearer to the files")
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, seen, depth + 1)
        else:
            yield entry


# --- records ------------------------------------------------------------------------------------


def _rows(source: Source, start: int, *, streaming: bool) -> readers.Rows:
    skip = readers.Skip(start)
    place = _locate(source.path)
    if place is None:
        yield from hub.read_hub(source, skip, streaming=streaming)
    elif place.is_dir() and hub.is_saved(place):
        yield from hub.read_saved(place, source, skip)
    elif place.is_dir() and _is_split(source):
        yield from hub.read_directory(place, source, skip)
    else:
        for file, path in _files(place, source.path):
            yield from readers.read(file, path, skip)
    if skip.left:
        raise DataError(
            f"{source.path}: holds fewer than the {start} rows that were read of it before the run was resumed: it has "
            "changed; bring back what it was, or begin a new run"
        )


def _contents(source: Source, place: Path) -> list[tuple[str, Path]]:
    """Every file that what is read can depend on, by its name in the directory."""
    if place.is_dir() and (hub.is_saved(place) or _is_split(source)):
        return sorted((file.relative_to(place).as_posix(), file) for file in _walk(place, set()) if file.is_file())
    return [(path.removeprefix(source.path).lstrip("/"), file) for file, path in _files(place, source.path)]


@lru_cache(maxsize=4096)
def _sha256_of_unchanged(file: Path, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> str:
    """Hash a file once in a process, as long as its status shows that nobody has changed it since."""
    return sha256_of_file(file)


def _lookup(row: Record, column: str, where: Location) -> Any:
    """The value of a column; a dotted one that is not there goes into nested objects. Raises DataError."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = [str(name) for name in value] if isinstance(value, Mapping) else []
            hint = did_you_mean(part, names) or (f"; there are {', '.join(names)}" if names else "")
            raise DataError(f"{where}: columns: no column {column!r}{hint}")
        value = value[part]
    return value
