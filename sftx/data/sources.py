"""Read the records of a source, each with its location.

A source is a file, the files that match a pattern, a directory of files, a directory that `save_to_disk` of `datasets`
wrote, a directory laid out as a hub dataset (read by `split` or `subset`), a hub dataset, or an address that a plugin
reads. Files may be in a store (`s3://bucket/rows.jsonl`): they are copied into the cache when they are read first.
Whatever it is, it has a name (its path), a fingerprint of its content, and records, each with its location.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from sftx import hub_lookup, paths, stores
from sftx.assembly.entry_points import discover
from sftx.assembly.stages.data_stages import RowSourceStage
from sftx.atomic_files import sha256_of_file
from sftx.config.default_plugins import SOURCES
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import hub, readers
from sftx.errors import ConfigError, DataError, SftxError, did_you_mean, kind_of, one_line
from sftx.types import Location, Record

log = logging.getLogger(__name__)

RowSources: TypeAlias = Mapping[str, RowSourceStage]
"""The source plugins of a run, by scheme."""
NO_PLUGINS: Final[RowSources] = MappingProxyType({})

SHIPPED: Final = "sftx:"
"""A path with this prefix names a file of the package: `sftx:demo/train.jsonl`."""

_PACKAGE: Final = Path(__file__).parents[1]
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_WILDCARD: Final = re.compile(r"[*?[]")
_DESCRIPTIONS: Final = frozenset({"dataset_info.json", "dataset_infos.json"})
"""Files that describe a dataset and hold none of its rows."""
_SPLIT: Final = re.compile(
    r"(train|validation|valid|val|dev|test|eval|held[-_]?out)(ing|uation)?([-_.]\d+)?(-of-\d+)?", re.IGNORECASE
)
_MOST_SHOWN: Final = 5
_DEEPEST: Final = 100
_GLANCE_BYTES: Final = 2**20


def check_data_config(config: RunConfig, row_sources: RowSources = NO_PLUGINS) -> None:
    """Check the options of `data` without reading rows or importing torch. Raises ConfigError, DataError.

    The hub is asked whether it has the datasets that are not here, unless it is switched off.
    """
    if not config.data.train:
        raise ConfigError("option 'data.train': no training data; give a file with --data")
    stores.refresh()
    all_sources = (*config.data.train, *config.data.eval)
    for source in all_sources:
        check(source, row_sources)
        if source.scheme not in row_sources and _locate(source.path) is None and not hub_lookup.is_offline():
            hub.find_commit(source.path)
    for scheme in row_sources.keys() - {source.scheme for source in all_sources}:
        log.warning("%s reads %s:..., and no path of the data begins so", row_sources[scheme], scheme)
    check_eval_fraction(config.data)
    _warn_of_repeated(config.data.train, row_sources)
    if not config.data.streaming:
        return
    if config.train.max_steps is None:
        raise ConfigError("option 'data.streaming': a stream has no end; say how many steps with --max-steps")
    filters = [config.data.filters, *(source.filters for source in config.data.train if source.filters is not None)]
    if any(one.duplicates == "drop" for one in filters):
        raise ConfigError("option 'data.streaming': filters.duplicates=drop needs all rows; leave one of them out")


def _warn_of_repeated(train: Sequence[Source], row_sources: RowSources) -> None:
    """Log a warning for a file that two sources read in the same way, so that each of its rows counts twice."""
    seen: set[str] = set()
    for source in train:
        how = replace(source, path="", weight=1.0)
        for place in _places(source, row_sources):
            if (key := repr((place, how))) in seen:
                log.warning(
                    "%s: %s is in two of the sources, so that each of its rows counts twice; to mean it, write %s:2",
                    source.path, place[0], source.path,
                )  # fmt: skip
                break
            seen.add(key)


def check_eval_fraction(data: DataConfig) -> None:
    """Raise ConfigError for options that contradict `eval_fraction`, or mean nothing without it."""
    if data.eval_fraction is None:
        if data.eval_group is not None:
            raise ConfigError("option 'data.eval_group': has no meaning without data.eval_fraction; leave it out")
    elif data.eval:
        raise ConfigError(
            "option 'data.eval_fraction': held-out rows are given with data.eval already; leave one of the two out"
        )
    elif data.streaming:
        raise ConfigError(
            "option 'data.eval_fraction': a stream is not read before it is trained on, so that it cannot be split; "
            "give held-out rows with --eval-data, or leave data.streaming out"
        )


def check_separate(data: DataConfig, row_sources: RowSources = NO_PLUGINS) -> None:
    """Raise ConfigError when a file, a split of a dataset, or an address is both trained on and held out."""
    trained = {place for source in data.train for place in _places(source, row_sources)}
    for source in data.eval:
        for place in _places(source, row_sources):
            if place in trained and data.max_overlap < 1:
                name = source.path if Path(place[0]).name == Path(source.path).name else f"{source.path} ({place[0]})"
                raise ConfigError(
                    f"{name}: is both training data and held-out data, so that a score says nothing; hold rows out "
                    "with --eval-fraction 0.1, name another file with --eval-data, or set data.max_overlap=1"
                )


def check(source: Source, row_sources: RowSources = NO_PLUGINS) -> None:
    """Check that the files of a source exist and can be opened, without reading them. Raises DataError, ConfigError."""
    if (plugin := row_sources.get(source.scheme or "")) is not None:
        for option in ("subset", "split", "encoding", "delimiter"):
            if (value := getattr(source, option)) is not None:
                raise ConfigError(f"{source.path}: is read by {plugin}, which has no {option}; leave {value!r} out")
        plugin.check(source.address)
        return
    is_in_store = stores.is_address(source.path)
    if source.scheme is not None and not (is_in_store or glob.glob(source.path) or os.path.lexists(source.scheme)):
        raise DataError(f"{source.path}: {_say_no_scheme(source.scheme, row_sources)}")
    place = _locate(source.path)
    if place is None:
        for option in ("encoding", "delimiter"):
            if (value := getattr(source, option)) is not None:
                raise ConfigError(f"{source.path}: is a hub dataset, and {option} {value!r} is for files of text")
        return
    if source.subset is not None and place.is_dir() and hub.is_saved(place):
        raise ConfigError(f"{source.path}: is a saved dataset, which has no subsets; leave {source.subset!r} out")
    for option in ("split", "subset"):
        if (value := getattr(source, option)) is not None and not place.is_dir():
            what = "names files" if _WILDCARD.search(source.path) else "is a file"
            raise ConfigError(
                f"{source.path}: {what}, and {option} {value!r} is for datasets; leave it out, or name the "
                "directory that holds the splits"
            )
    files = [] if _is_dataset_directory(place, source) else _files(place, source.path)
    for file, path in files:
        if not is_in_store and not os.access(file, os.R_OK):
            raise DataError(f"{path}: cannot be read: permission denied")
    for option in ("encoding", "delimiter"):
        if (value := getattr(source, option)) is not None and not any(readers.is_text(file) for file, _ in files):
            raise ConfigError(f"{source.path}: is no text, and {option} {value!r} is for text; leave it out")


def _say_no_scheme(scheme: str, row_sources: RowSources) -> str:
    """Return the error of a path that begins with a scheme that no plugin of the run has."""
    known = sorted({*row_sources, *SOURCES})
    others = [info.name for info in discover() if not info.value.startswith("sftx_plugins.")]
    start = f"no such file, and no plugin of this run reads {scheme}:..."
    if scheme in (*SOURCES, *others):
        return f"{start}; add --plugin {scheme}"
    hint = did_you_mean(scheme, known) or f"; known {'is' if len(known) == 1 else 'are'} {', '.join(known)}."
    installed = ", ".join(others) or "none beside those of sftx"
    return f"{start}{hint} A source plugin is added with --plugin NAME; installed: {installed}"


def read(
    source: Source,
    row_sources: RowSources = NO_PLUGINS,
    *,
    encoding: str = "utf-8",
    streaming: bool = False,
    start: int = 0,
) -> Iterator[tuple[Location, Record]]:
    """Yield the records in order, one at a time. Raises DataError for a source without rows or an unreadable row.

    `encoding` is that of text files, unless the source names its own. The first `start` records, which a resumed run
    has read before, are skipped; a source with fewer records is an error. With `streaming` a hub dataset is not
    downloaded as a whole; other sources ignore it.
    """
    check(source, row_sources)
    is_empty = start == 0
    num_rows = None if source.limit is None else max(0, source.limit - start)
    if (plugin := row_sources.get(source.scheme or "")) is not None:
        rows: readers.Rows = _rows_of_plugin(plugin, source, start)
    else:
        rows = _rows(source, start, source.encoding or encoding, streaming=streaming)
    for where, row in islice(rows, num_rows):
        is_empty = False
        if not isinstance(row, dict):
            raise DataError(f'{where}: got {kind_of(row)}, expected an object such as {{"messages": [...]}}')
        yield where, row
    if is_empty:
        raise DataError(f"{source.path}: holds no rows")


def mapped(row: Record, columns: Mapping[str, str], where: Location) -> Record:
    """Return a record with the fields that `columns` lists, or the row itself when it lists none.

    `columns` has the name of the column for each field. Raises DataError for a column that the row lacks.
    """
    return {field: column_value(row, column, where) for field, column in columns.items()} if columns else row


def column_value(row: Record, column: str, where: Location) -> Any:
    """Return the value of a column; `a.b` is the key `b` of the object `a` unless a column has that name.

    Raises DataError for a column that the row lacks.
    """
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


def fingerprint(source: Source, row_sources: RowSources = NO_PLUGINS) -> str | None:
    """Return a SHA-256, in hexadecimal, of everything that decides what `read` yields. Raises DataError.

    For a single file without further options it is the SHA-256 of its bytes, as `sha256sum` prints it. For a hub
    dataset it depends on the commit. None: the plugin that reads the source cannot tell.
    """
    check(source, row_sources)
    options = {name: getattr(source, name) for name in ("columns", "subset", "split", "limit")}
    # Left out where they are not set, so that fingerprints stay what they were before these options were added.
    options |= {name: value for name in ("encoding", "delimiter") if (value := getattr(source, name)) is not None}
    content: Any
    if (plugin := row_sources.get(source.scheme or "")) is not None:
        content = plugin.fingerprint(source.address)
        return None if content is None else _hash([content, options])
    place = _locate(source.path)
    if place is None:
        content = hub.hub_fingerprint(source)
    else:
        content = []
        for name, file in _all_files(source, place):
            _fetch(source.path, file)
            try:
                status = file.stat()
                digest = _sha256_of_unchanged(
                    file, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
                )
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {one_line(error)}") from error
            content.append((name, digest))
        if place.is_file() and not any(options.values()):
            return str(content[0][1])
    return _hash([content, options])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def glance(source: Source, row_sources: RowSources = NO_PLUGINS) -> str | None:
    """Return a SHA-256 of the size, the first and the last MiB of every file: a quick substitute of `fingerprint`.

    For a hub dataset, return its commit; for an address of a plugin, its fingerprint; for files in a store, a SHA-256
    of what the store says of them. Raises DataError.
    """
    if source.scheme in row_sources:
        return fingerprint(source, row_sources)
    check(source)
    place = _locate(source.path)
    if place is None:
        return hub.hub_fingerprint(source)
    if (found := _find(source.path)) is not None:
        return _hash([(file.name, file.size, file.fingerprint) for file in found.files])
    digest = hashlib.sha256()
    for name, file in _all_files(source, place):
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(f"{name} {size}\n".encode())
            for start in (0, max(0, size - _GLANCE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_GLANCE_BYTES))
    return digest.hexdigest()


def file_names(source: Source, row_sources: RowSources = NO_PLUGINS) -> list[str]:
    """Return the files of a directory or a pattern in the order in which they are read; an empty list for others."""
    place = None if source.scheme in row_sources else _locate(source.path)
    if place is None or _is_dataset_directory(place, source):
        return []
    if place.is_file() or ((found := _find(source.path)) is not None and found.kind == "file"):
        return []
    return [path for _, path in _files(place, source.path)]


def holds(source: Source, path: Path) -> bool:
    """Return whether a file, which need not exist yet, is or would be one that the source is read from."""
    if source.scheme is not None or (place := _locate(source.path)) is None:
        return False
    path = path.resolve()
    if place.is_dir():
        return path.is_relative_to(place.resolve())
    return path.match(str(place.absolute())) or any(path == file.resolve() for file, _ in _files(place, source.path))


def num_bytes(source: Source, row_sources: RowSources = NO_PLUGINS) -> int:
    """Return the size of the source's files on disk, compressed or not, and 0 for a hub dataset. Raises DataError."""
    if (plugin := row_sources.get(source.scheme or "")) is not None:
        return plugin.num_bytes(source.address)
    if (found := _find(source.path)) is not None:
        return sum(file.size or 0 for file in found.files)
    place = _locate(source.path)
    return 0 if place is None else sum(file.stat().st_size for _, file in _all_files(source, place))


def resolve(path: str) -> Path:
    """Return the file or directory that `path` names. Raises DataError when it does not exist."""
    try:
        place = _expand(path)
        if paths.exists(place):
            return place
        is_dangling = place.is_symlink()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL byte, an unknown home directory
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
    if is_dangling:
        raise DataError(f"{path}: is {_dangling_link(place)}")
    before, colon, after = path.rpartition(":")
    if colon and _expand(before).exists():
        raise DataError(
            f"{path}: no such file; {before} is there, and {after!r} is no weight from 0 to 1000, such as 2"
        )
    looked = "" if place.is_absolute() else f" (looked in {Path.cwd()})"
    raise DataError(f"{path}: no such file{looked}{hub_lookup.nearest(path)}")


# --- files --------------------------------------------------------------------------------------


def _find(path: str) -> stores.Found | None:
    """Return what an address in a store leads to, None for any other path. Raises DataError."""
    if not stores.is_address(path):
        return None
    try:
        return stores.find(path)
    except SftxError as error:
        raise DataError(str(error)) from error


def _fetch(path: str, file: Path | None = None) -> None:
    """Copy what an address in a store leads to into the cache, or one file of it; do nothing for any other path.

    Raises DataError.
    """
    if (found := _find(path)) is not None:
        try:
            stores.fetch_files(found, [one for one in found.files if file in (None, found.copies / one.name)])
        except SftxError as error:
            raise DataError(str(error)) from error


def _locate(path: str) -> Path | None:
    """Return the file, directory or pattern, or None when the path can only be a hub dataset. Raises DataError.

    For an address it is the place of the copies. Those of a directory are made here, those of files when they are read.
    """
    if (found := _find(path)) is not None:
        if found.kind == "directory":
            _fetch(path)
        return found.place
    looks_like_file = path.startswith(".") or readers.kind(Path(path)) is not None
    if _HUB_ID.fullmatch(path) and not looks_like_file and not os.path.lexists(path):
        return None
    if _WILDCARD.search(path) and "\0" not in path and not os.path.lexists(pattern := _expand(path)):
        try:
            paths.exists(pattern)
        except OSError as error:  # too long a name
            raise DataError(f"{path}: cannot be read: {one_line(error)}") from error
        return pattern
    return resolve(path)


def _expand(path: str) -> Path:
    """Return the place of a path of the package or below a home directory. Raises RuntimeError for an unknown home."""
    return _PACKAGE / path.removeprefix(SHIPPED) if path.startswith(SHIPPED) else Path(path).expanduser()


def _places(source: Source, row_sources: RowSources) -> list[tuple[str, str | None, str | None]]:
    """Return the files of a source, or the dataset with its subset and split, or the address of a plugin."""
    if source.scheme in row_sources:
        return [(source.path, None, None)]
    place = _locate(source.path)
    if place is not None and not _is_dataset_directory(place, source):
        return [(str(file.resolve()), None, None) for file, _ in _files(place, source.path)]
    name = source.path if place is None else str(place.resolve())
    return [(name, source.subset, source.split or hub.DEFAULT_SPLIT)]


def _is_dataset_directory(place: Path, source: Source) -> bool:
    """Return whether `datasets` reads this directory: it wrote it, or the source chooses a split or a subset."""
    return place.is_dir() and (source.split is not None or source.subset is not None or hub.is_saved(place))


def _all_files(source: Source, place: Path) -> list[tuple[str, Path]]:
    """Return every file that the records can depend on, with its name relative to the source's path."""
    if _is_dataset_directory(place, source):
        return sorted((file.relative_to(place).as_posix(), file) for file in _walk(place, set()) if file.is_file())
    if (found := _find(source.path)) is not None:
        return [(file.relative_to(found.copies).as_posix(), file) for file, _ in _files(place, source.path)]
    fixed = source.path if place.exists() else _WILDCARD.split(str(place))[0].rpartition("/")[0]
    return [(path.removeprefix(fixed).lstrip("/"), file) for file, path in _files(place, source.path)]


def _files(place: Path, path: str) -> list[tuple[Path, str]]:
    """Return the files of rows at `place`, sorted by path, each with its name for errors. Raises DataError."""
    stored = _find(path)
    if stored is not None and stored.kind != "directory":
        found = [(stored.address_of(file.name), stored.copies / file.name) for file in stored.files]
        prefix, what = "", "matches this pattern, but" if stored.kind == "pattern" else "is there, but"
    elif place.is_dir():
        found = sorted((file.relative_to(place).as_posix(), file) for file in _walk(place, set()))
        prefix, what = f"{path.rstrip('/')}/", "is in this directory, which holds"
    elif place.exists():
        _check_file(place, path)
        return [(place, path)]
    else:
        found = _matches(place, path)
        prefix, what = "", "matches this pattern, but"
    files = [(n, file) for n, file in found if readers.kind(file) is not None and file.name not in _DESCRIPTIONS]
    if not files:
        names = ", ".join(name for name, _ in found[:_MOST_SHOWN]) + (", ..." if len(found) > _MOST_SHOWN else "")
        raise DataError(f"{path}: no file of rows {what} {names or 'nothing'}; known are {readers.known()}")
    # Held-out rows must not be trained on only because their file is in the same directory.
    splits = {}
    base = str(place.parent) if stored is None else stored.base
    for name, _ in files:
        for part in name.removeprefix(base).split("/"):
            if match := _SPLIT.fullmatch(part.partition(".")[0]):
                splits[match[1].lower()] = name
    if len(splits) > 1:
        choose = "choose one with split: NAME, or name the files" if place.is_dir() else "name the files of one"
        raise DataError(f"{path}: holds several splits ({', '.join(sorted(splits.values()))}); {choose}")
    named = [(file, f"{prefix}{name}") for name, file in files]
    for file, name in named if stored is None else ():
        _check_file(file, name)
    return named


def _matches(pattern: Path, path: str) -> list[tuple[str, Path]]:
    """Return the files that match a pattern, and those below directories that do, sorted by name. Raises DataError."""
    # A file that is found several times, because a link leads back to it, is read once, under its shortest name.
    found: dict[str, Path] = {}
    seen: set[tuple[int, int]] = set()
    for name in sorted(glob.glob(str(pattern), recursive=True), key=lambda name: (name.count("/"), name)):
        for file in _walk(Path(name), seen) if Path(name).is_dir() else [Path(name)]:
            found.setdefault(os.path.realpath(file), file)
    if not found:
        raise DataError(
            f"{path}: no file matches this pattern" + ("" if pattern.is_absolute() else f" (looked in {Path.cwd()})")
        )
    return sorted((file.as_posix(), file) for file in found.values())


def _check_file(file: Path, path: str) -> None:
    if not file.is_file():
        what = "no regular file" if file.exists() else _dangling_link(file)
        raise DataError(f"{path}: is {what}")
    if readers.kind(file) is None:
        what = f"unknown kind of file {file.suffix!r}" if file.suffix else "has no suffix to tell how it is read"
        raise DataError(f"{path}: {what}; known are {readers.known()}")


def _dangling_link(link: Path) -> str:
    """Return what a link is that leads to no file."""
    try:
        link.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads back to itself"
    return f"a link to {os.readlink(link)}, which is not there"


def _walk(directory: Path, seen: set[tuple[int, int]], depth: int = 0) -> Iterator[Path]:
    """Yield every file below `directory` except hidden ones. A directory that is linked to twice is read once."""
    try:
        status = directory.stat()
        entries = [(entry, entry.is_dir()) for entry in sorted(directory.iterdir()) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {one_line(error)}") from error
    if (status.st_dev, status.st_ino) in seen:
        return
    if depth > _DEEPEST:
        raise DataError(f"{directory}: is more than {_DEEPEST} directories deep; name one nearer to the files")
    seen.add((status.st_dev, status.st_ino))
    for entry, is_directory in entries:
        if is_directory:
            yield from _walk(entry, seen, depth + 1)
        else:
            yield entry


@lru_cache(maxsize=4096)
def _sha256_of_unchanged(file: Path, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> str:
    """Hash a file once in a process, as long as its status shows that it was not changed since."""
    return sha256_of_file(file)


# --- records ------------------------------------------------------------------------------------


def _rows(source: Source, start: int, encoding: str, *, streaming: bool) -> readers.Rows:
    skip = readers.Skip(start)
    place = _locate(source.path)
    if place is None:
        yield from hub.read_hub(source, skip, streaming=streaming)
    elif place.is_dir() and hub.is_saved(place):
        yield from hub.read_saved(place, source, skip)
    elif _is_dataset_directory(place, source):
        yield from hub.read_directory(place, source, skip)
    else:
        for file, path in _files(place, source.path):
            _fetch(source.path, file)
            yield from readers.read(readers.RowFile(file, path, encoding, source.delimiter), skip)
    if skip.left:
        raise _holds_fewer(source, start)


def _rows_of_plugin(plugin: RowSourceStage, source: Source, start: int) -> readers.Rows:
    is_empty = True
    for row in plugin.rows(source.address, start):
        is_empty = False
        yield row
    if is_empty and start and next(plugin.rows(source.address, start - 1), None) is None:
        raise _holds_fewer(source, start)


def _holds_fewer(source: Source, start: int) -> DataError:
    return DataError(
        f"{source.path}: holds fewer than the {start} rows that were read of it before the run was resumed: it has "
        "changed; restore it, or begin a new run"
    )
