"""Files in remote stores, which an address names (`s3://bucket/rows.jsonl`): listed, copied into the cache, written.

The one module that knows fsspec, which is imported when an address is used. Credentials are those of each store's own
library, from the environment or its configuration. A copy belongs to the store's own fingerprint of the file (ETag,
checksum, or time and size), so that a file that has changed is copied again. One process of a host copies, the others
wait for it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from sftx import atomic_files
from sftx.errors import SftxError, did_you_mean, hide, one_line
from sftx.paths import cache_dir
from sftx.phases import phase

T = TypeVar("T")

_ADDRESS: Final = re.compile("([a-z][a-z0-9+-]+)://(.+)", re.DOTALL)  # a single letter is a drive of Windows
_WILDCARD: Final = re.compile(r"[*?[]")
_WEB: Final = ("http", "https")
"""Protocols of single files: nothing is listed or written, and what follows `?` is a query."""

_WITH_BUCKETS: Final = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "tos", "hf")
"""Protocols without directories: where one is asked for, the bucket is made, whose name may be a slip."""

MASK: Final = "***"
_SECRET_NAME: Final = re.compile(r"sig|token|secret|passw|auth|cred|key|^x-(amz|goog|ms)-", re.IGNORECASE)
_LONG: Final = 16
"""Characters from which on the value of a query may be a secret, whatever its name is."""

_STRONG: Final = (
    "ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "crc32c", "generation", "blob_id",
    "xet_hash", "VersionId",
)  # fmt: skip
_WEAK: Final = ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "modified", "created")
"""What stores say of a file's content: something that is computed from it, or when it was written."""

_ATTEMPTS: Final = 3
_DELAY_S = 1.0
_FINAL: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
"""Errors that another attempt does not cure."""


def is_address(text: str) -> bool:
    """Return whether the text is `PROTOCOL://...`, and so no path of this machine."""
    return _ADDRESS.fullmatch(text) is not None


def protocol(address: str) -> str:
    """Return the part of an address before `://`."""
    return address.partition("://")[0]


# --- addresses with secrets -----------------------------------------------------------------------

_SPOKEN_OUT: Final[dict[str, str]] = {}
"""The addresses that were given with secrets, by what is shown and recorded of them."""


def mask(address: str) -> str:
    """Return an address as it may be shown and recorded: without a password, and without a query that has a secret.

    This process still reads the address that was given, and no message of it has the secrets. Other text is returned as
    it is.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return address
    start, rest = match[1], match[2]
    secrets: list[str] = []
    if login := re.match(r"([^/?#@:]*):([^/?#@]+)@", rest):
        secrets.append(login[2])
        rest = f"{login[1]}:{MASK}@{rest[login.end() :]}"
    path, has_query, query = rest.partition("?") if start in _WEB else (rest, "", "")
    values = urllib.parse.parse_qsl(query, keep_blank_values=True)
    if has_query and query != MASK:
        named = any(_SECRET_NAME.search(name) for name, _ in values)
        if named or any(len(value) >= _LONG for _, value in values) or (query and not values):
            raw = [part.partition("=")[2] for part in query.split("&")]
            secrets += [query, *(value for value in [*raw, *(value for _, value in values)] if len(value) >= _LONG)]
            rest = f"{path}?{MASK}"
    secrets = [secret for secret in secrets if secret != MASK]
    if not secrets:
        return address
    for secret in secrets:
        hide(secret)
        hide(urllib.parse.unquote(secret))
    shown = f"{start}://{rest}"
    _SPOKEN_OUT[shown] = address
    return shown


def _whole(address: str) -> str:
    """Return the address that was given, of which `address` may be what is shown. Raises SftxError."""
    whole = _SPOKEN_OUT.get(address, address)
    if f"?{MASK}" in whole or f":{MASK}@" in whole:
        raise SftxError(f"{address}: its secret was masked when the run file was written; give the whole address again")
    return whole


# --- looking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredFile:
    """A file in a store."""

    name: str
    """Relative to the directory that was looked at."""
    path: str
    """As its file system takes it."""
    size: int | None
    fingerprint: str | None
    """What changes when the content does; None where the store does not tell."""


@dataclass(frozen=True)
class Found:
    """The target of an address: a file, a directory, or the files that match a pattern."""

    address: str
    kind: str
    """file, directory or pattern."""
    files: tuple[StoredFile, ...]
    """Sorted by name."""
    base: str
    """The address below which the files have their names."""

    @property
    def copies(self) -> Path:
        """The directory of the copies, whether they are there yet or not."""
        return copies_of(self.address)

    @property
    def place(self) -> Path:
        """The copy of the file or of the directory; of a pattern, the same pattern of copies."""
        if self.kind == "directory":
            return self.copies
        return self.copies / (self.files[0].name if self.kind == "file" else self.address[len(self.base) :].lstrip("/"))

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)

    def address_of(self, name: str) -> str:
        """Return the address of one of the files."""
        return self.address if self.kind == "file" else f"{self.base}/{name}"


_found: Final[dict[str, Found]] = {}
_fetched: Final[set[tuple[str, str]]] = set()


def refresh() -> None:
    """Ask the stores again: what was found before is forgotten. Called when a run begins."""
    _found.clear()
    _fetched.clear()


def find(address: str) -> Found:
    """Return what an address leads to, which is asked once until `refresh`. Raises SftxError."""
    if (known := _found.get(address)) is None:
        with phase("looking", f"at {address}"):
            known = _found[address] = _attempted(address, "read", lambda: _look(address))
    return known


def _look(address: str) -> Found:
    files, path = connect(address)
    files.invalidate_cache()
    base, kind = address.rstrip("/"), "file"
    if _WILDCARD.search(path) and protocol(address) not in _WEB:
        kind = "pattern"
        fixed = _WILDCARD.split(path)[0].rpartition("/")[0]
        base = _WILDCARD.split(address)[0].rpartition("/")[0]
        infos: dict[str, Any] = {}
        for name, info in files.glob(path, detail=True).items():
            infos |= files.find(name, detail=True) if info["type"] == "directory" else {name: info}
        if not infos:
            raise SftxError(f"{address}: no file matches this pattern")
    else:
        info = files.info(path)
        fixed = path.rstrip("/")
        if info["type"] != "directory":
            name = address.partition("?")[0].rstrip("/").rpartition("/")[2] if protocol(address) in _WEB else path
            return Found(address, kind, (_stored(name.rpartition("/")[2], path, info),), base)
        kind, infos = "directory", files.find(path, detail=True)
    found = [
        _stored(name[len(fixed) :].lstrip("/"), name, info) for name, info in infos.items() if info["type"] == "file"
    ]
    shown = [file for file in found if not any(part.startswith(".") for part in file.name.split("/"))]
    return Found(address, kind, tuple(sorted(shown, key=lambda file: file.name)), base)


def _stored(name: str, path: str, info: Mapping[str, Any]) -> StoredFile:
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise SftxError(f"{path}: is a name in a store that cannot be one of a file here")
    size = info.get("size")
    said = {key: str(info[key]) for key in _STRONG if info.get(key)}
    said = said or {key: str(info[key]) for key in _WEAK if info.get(key)}
    fingerprint = json.dumps({**said, "size": size}, sort_keys=True) if said else None
    return StoredFile(name, path, None if size is None else int(size), fingerprint)


def connect(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path there. Raises SftxError."""
    import fsspec
    from fsspec.registry import known_implementations

    name, whole = protocol(address), _whole(address)
    options: dict[str, Any] = {}
    try:
        if name in _WEB:
            import aiohttp

            # Proxies are those of the environment. A file may take any time, but not the next piece of it.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        found: tuple[Any, str] = fsspec.core.url_to_fs(whole, **options)
        return found
    except ImportError as error:
        library = str(known_implementations.get(name, {}).get("class", "")).partition(".")[0]
        need = "aiohttp and requests" if name in _WEB else library if library not in ("", "fsspec") else ""
        if not need or (library and library != "fsspec" and importlib.util.find_spec(library) is not None):
            raise SftxError(f"{address}: {name}:// cannot be used: {one_line(error)}") from error
        brought_by = {"s3fs": "'sftx[s3]'", "gcsfs": "'sftx[gcs]'"}.get(need, need.replace(" and", ""))
        raise SftxError(f"{address}: {name}:// needs {need}; pip install {brought_by}") from None
    except ValueError as error:
        if name not in known_implementations:
            hint = (
                did_you_mean(name, known_implementations) or "; s3, gs, abfs, hf, https and others of fsspec are read"
            )
            raise SftxError(f"{address}: nothing here reads {name}://{hint}") from None
        raise SftxError(f"{address}: cannot be used: {one_line(error)}") from error


def _attempted(address: str, what: str, work: Callable[[], T]) -> T:
    """Do something with a store, up to three times. Raises SftxError."""
    for number in range(_ATTEMPTS):
        try:
            return work()
        except SftxError:
            raise
        except FileNotFoundError as error:
            # A web server that refuses, or does not answer, is reported in this way too.
            why = f" ({one_line(error.__cause__, max_chars=160)})" if error.__cause__ is not None else ""
            raise SftxError(f"{address}: no such file or directory in the store{why}") from None
        except PermissionError as error:
            raise SftxError(
                f"{address}: may not be {what}: {one_line(error)}; credentials are taken from the environment or the "
                f"configuration, as the library for {protocol(address)}:// takes them"
            ) from error
        except Exception as error:  # each library of a store has its own
            if number + 1 == _ATTEMPTS or isinstance(error, _FINAL):
                raise SftxError(f"{address}: cannot be {what}: {type(error).__name__}: {one_line(error)}") from error
            time.sleep(_DELAY_S * 2**number)
    raise AssertionError("unreachable")


# --- copies -------------------------------------------------------------------------------------


def copies_of(address: str) -> Path:
    """Return the directory in the cache for copies of what an address leads to."""
    return cache_dir() / "remote" / hashlib.sha256(address.encode()).hexdigest()[:24] / "files"


def is_copy(path: Path) -> bool:
    """Return whether a path is one of copies in the cache."""
    return path.is_relative_to(cache_dir() / "remote")


def fetch(address: str, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Copy the files of an address whose names are wanted, unless they are there unchanged; return the place of them.

    Copies of files that the store no longer has are removed. Raises SftxError.
    """
    found = find(address)
    fetch_files(found, [file for file in found.files if wanted(file.name)])
    return found.place


def fetch_files(found: Found, files: Iterable[StoredFile]) -> None:
    """Copy these files of what was found, unless their copies are there and unchanged. Raises SftxError."""
    missing = [file for file in files if (found.address, file.name) not in _fetched]
    if not missing:
        return
    from filelock import FileLock

    home = found.copies.parent
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        record = home / "fingerprints.json"
        try:
            known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        for name in known.keys() - found.names:
            (found.copies / name).unlink(missing_ok=True)
            del known[name]
        for file in missing:
            copy = found.copies / file.name
            is_there = copy.is_file() and known.get(file.name) == [file.fingerprint, copy.stat().st_size]
            if not is_there or file.fingerprint is None:
                known.pop(file.name, None)
                download(found.address_of(file.name), file, copy)
                known[file.name] = [file.fingerprint, copy.stat().st_size]
                atomic_files.write_json(record, known)
            _fetched.add((found.address, file.name))


def download(address: str, file: StoredFile, to: Path) -> None:
    """Copy one file, which appears whole or not at all. Raises SftxError."""

    def copy(part: Path) -> None:
        files, _ = connect(address)
        files.get_file(file.path, str(part))
        if file.size is not None and part.stat().st_size != file.size:
            raise OSError(f"{part.stat().st_size:,} of {file.size:,} bytes came")

    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        with phase("fetching", address):
            _attempted(address, "read", lambda: copy(part))
        part.replace(to)
    finally:
        part.unlink(missing_ok=True)


_NOT_LOADED: Final = (
    "*.h5", "*.msgpack", "*.onnx*", "onnx/*", "original/*", "checkpoints/*", "export/*", "merged/*",
)  # fmt: skip


def model_directory(name: str) -> Path:
    """Return the place of a model, an adapter or a run: a path of this machine, or the copy of what an address names.

    Checkpoints and exports of a run are left out. Raises SftxError.
    """
    if not is_address(name):
        return Path(name).expanduser()
    return fetch(name, lambda file: not any(fnmatch.fnmatch(file, pattern) for pattern in _NOT_LOADED))


# --- writing ------------------------------------------------------------------------------------


class RemoteDirectory:
    """A directory in a store that is written to. Its methods raise whatever the store's library raises."""

    def __init__(self, address: str) -> None:
        """Raises SftxError for an address that cannot be written to."""
        if protocol(address) in _WEB:
            raise SftxError(f"{address}: cannot be written to; name a place in a store, such as s3://bucket/runs/x")
        self.address = address.rstrip("/")
        self.files, path = connect(self.address)
        self.path = str(path).rstrip("/")

    def sizes(self, under: str = "") -> dict[str, int]:
        """Return the files, or those below one directory, by their names in this directory; none if it is not there."""
        self.files.invalidate_cache()
        place = f"{self.path}/{under}".rstrip("/")
        try:
            infos = self.files.find(place, detail=True)
        except FileNotFoundError:
            return {}
        return {
            name[len(self.path) :].lstrip("/"): int(info.get("size") or 0)
            for name, info in infos.items()
            if info["type"] == "file" and name != place
        }

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, None when there is no such file."""
        self.files.invalidate_cache()
        try:
            content: bytes = self.files.cat_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, file: Path, moved: Callable[[], None]) -> None:
        """Copy a local file there. `moved` is called as it moves on. Raises OSError when not all of it arrived."""
        from fsspec.callbacks import Callback

        class Moving(Callback):  # type: ignore[misc]
            def call(self, *args: Any, **kwargs: Any) -> None:
                moved()

        place = f"{self.path}/{name}"
        least = file.stat().st_size
        self._make_parent(place)
        self.files.put_file(str(file), place, callback=Moving())
        self.files.invalidate_cache()
        size = int(self.files.info(place)["size"])
        if not least <= size <= file.stat().st_size:  # what is appended to meanwhile may be longer
            raise OSError(f"{name}: {size:,} of {least:,} bytes arrived")
        moved()

    def download(self, name: str, to: Path, size: int) -> None:
        """Copy a file from there. Raises SftxError."""
        download(f"{self.address}/{name}", StoredFile(name, f"{self.path}/{name}", size, None), to)

    def remove(self, names: Sequence[str], directories: Collection[str] = ()) -> None:
        """Remove files in this order, then what is left of directories. What is not there is passed over."""
        for name in names:
            try:
                self.files.rm_file(f"{self.path}/{name}")
            except FileNotFoundError:
                continue
        for name in directories:
            try:
                self.files.rm(f"{self.path}/{name}", recursive=True)
            except FileNotFoundError:  # a store without directories
                continue
        self.files.invalidate_cache()

    def _make_parent(self, place: str) -> None:
        if protocol(self.address) not in _WITH_BUCKETS:
            self.files.makedirs(place.rpartition("/")[0], exist_ok=True)

    def check(self) -> dict[str, int]:
        """Write a file and remove it again; return the sizes of what is there. Raises SftxError."""

        def probe() -> dict[str, int]:
            place = f"{self.path}/.check"
            self._make_parent(place)
            self.files.pipe_file(place, b"sftx")
            self.files.rm_file(place)
            return self.sizes()

        return _attempted(self.address, "written", probe)

    def look(self) -> dict[str, int]:
        """Return the sizes of what is there. Raises SftxError."""
        return _attempted(self.address, "read", self.sizes)
