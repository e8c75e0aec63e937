"""Rows from SQLite databases, which are opened read-only and left without a trace.

A database must not change while a run reads it: the rows of a later pass, or of a resumed run, would be others. That is
checked before rows are handed on, and not ensured by a lock, so that no program that writes to it has to wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

from pydantic import Field

from sftx import DataError, Location, Record, RowSource, hookimpl

_ADDRESS: Final = re.compile(r"(.+?)(?:\?(\w+)=\s*(.*?)[\s;]*)?", re.DOTALL)
_NO_CODE: Final = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
"""What is no code in SQL: texts, quoted names and comments."""
_JSON_COLUMNS: Final = frozenset(
    {"messages", "conversations", "tools", "history", "input_ids", "labels"}
    | {"attention_mask", "loss_mask", "completion_mask", "assistant_masks"}
)
"""The fields of the built-in formats that are lists and never text."""
_ROWID_NAMES: Final = ("rowid", "_rowid_", "oid")
_BATCH_ROWS: Final = 256
_PIECE_BYTES: Final = 2**20
_LONGEST_NAME: Final = 80
_MOST_SHOWN: Final = 10

State: TypeAlias = tuple[tuple[int, int, int] | None, ...]
"""Size, time of the last change and inode of a database and of its write-ahead log; None for one that is not there."""


@dataclass(frozen=True, eq=False)
class SQLite:
    """Reads SQLite databases: `sqlite:FILE`, `sqlite:FILE?table=NAME` or `sqlite:FILE?query=SQL` with an ORDER BY.

    The rows of a table come in the order of their rowid or primary key. A path of the data that begins with `sqlite:`
    adds this plugin.
    """

    json_columns: Annotated[
        tuple[str, ...] | None,
        Field(
            description="Columns in which text that begins with [ or { is JSON; by default those declared as JSON, and "
            "messages, conversations, tools, history and the fields of token ids."
        ),
    ] = None

    @hookimpl
    def sftx_source(self) -> RowSource:
        return Databases(self.json_columns)


@dataclass(frozen=True)
class _Selection:
    """The part of a database that is read."""

    sql: str
    path: str
    """The first part of each row's location."""
    unit: str
    """`rowid` where the first column is the rowid and names the row, else `row`."""
    json_columns: frozenset[str]
    can_skip: bool
    """Whether the SQL has a parameter for the number of rows to skip."""


class Databases:
    """Reads the databases of one run."""

    scheme = "sqlite"

    def __init__(self, json_columns: Sequence[str] | None) -> None:
        self._json_columns = None if json_columns is None else frozenset(json_columns)
        self._states: dict[Path, State] = {}
        self._digests: dict[Path, list[str]] = {}

    def check(self, address: str) -> None:
        with self._opened(address) as (_, database):
            selection = self._select(address, database)
            _check_sql(selection, database, address)

    def rows(self, address: str, start: int) -> Iterator[tuple[Location, Record]]:
        with self._opened(address) as (file, database):
            selection = self._select(address, database)
            _check_sql(selection, database, address)
            cursor = database.execute(selection.sql, (start,) if selection.can_skip else ())
            names = [name for name, *_ in cursor.description][1 if selection.unit == "rowid" else 0 :]
            if repeated := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{selection.path}: two columns are called {repeated[0]!r}; rename one of them with AS")
            for _ in islice(cursor, 0 if selection.can_skip else start):
                pass
            number, last = start, f"after {start} rows"
            is_end = False
            while not is_end:
                batch = _fetch(cursor, selection, last)
                is_end = not batch
                self._check_unchanged(file, address)
                for values in batch:
                    number += 1
                    where = Location(selection.path, number, "row")
                    if selection.unit == "rowid":
                        where, values = Location(selection.path, values[0], "rowid"), values[1:]
                    yield where, _record(dict(zip(names, values, strict=True)), selection, where)
                    last = f"after {where.unit} {where.number}"

    def fingerprint(self, address: str) -> str:
        file, table, query = _parsed(address)
        with self._opened(address):  # raises DataError for a database that cannot be read, or has changed
            if file not in self._digests:
                digests = [_digest(part) for part in (file, _log_of(file)) if _size(part)]
                self._check_unchanged(file, address)
                self._digests[file] = digests
        columns = None if self._json_columns is None else sorted(self._json_columns)
        return hashlib.sha256(json.dumps([self._digests[file], table, query, columns]).encode()).hexdigest()

    def num_bytes(self, address: str) -> int:
        file = _parsed(address)[0]
        return _size(file) + _size(_log_of(file))

    def example(self, directory: Path, texts: Sequence[str]) -> str:
        file = directory / "chats.db"
        file.unlink(missing_ok=True)
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE chats (id INTEGER PRIMARY KEY, messages TEXT)")
            for text in texts:
                messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]
                row = json.dumps(messages, ensure_ascii=False)
                database.execute("INSERT INTO chats (messages) VALUES (?)", (row,))
            database.commit()
        return str(file)

    @contextmanager
    def _opened(self, address: str) -> Iterator[tuple[Path, sqlite3.Connection]]:
        """Open the database of an address, and raise its errors as DataError."""
        file = _parsed(address)[0]
        name = address.partition("?")[0]
        try:
            try:
                is_regular = stat.S_ISREG(file.stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                raise DataError(f"{name}: no such file") from None
            if not is_regular:
                raise DataError(f"{name}: is no regular file")
            self._check_unchanged(file, address)
            with closing(_connect(file)) as database:
                yield file, database
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"{name}: cannot be read: {_explain(error, file)}") from error

    def _check_unchanged(self, file: Path, address: str) -> None:
        """Raise DataError when the database has changed since this run began to read it."""
        state = _state(file)
        if self._states.setdefault(file, state) != state:
            raise DataError(
                f"{address.partition('?')[0]}: has changed since this run began to read it; give the run a copy of its "
                "own, as the command VACUUM INTO of SQLite makes"
            )

    def _select(self, address: str, database: sqlite3.Connection) -> _Selection:
        """Return what the address names. Raises DataError for a table or a query that cannot be read in an order."""
        name = address.partition("?")[0]
        _, table, query = _parsed(address)
        if query is not None:
            _check_query(query, name)
            decoded = _JSON_COLUMNS if self._json_columns is None else self._json_columns
            return _Selection(query, f"{name}[{_short(query)}]", "row", decoded, can_skip=False)
        table = _find_table(table, database, name)
        sql, unit, declared = _select_table(table, database, name)
        decoded = _JSON_COLUMNS | declared if self._json_columns is None else self._json_columns
        return _Selection(sql, f"{name}[{table}]", unit, decoded, can_skip=True)


def _fetch(cursor: sqlite3.Cursor, selection: _Selection, last: str) -> list[tuple[Any, ...]]:
    try:
        return cursor.fetchmany(_BATCH_ROWS)
    except sqlite3.Error as error:
        raise DataError(f"{selection.path}: cannot be read {last}: {error}") from error


def _record(record: dict[str, Any], selection: _Selection, where: Location) -> dict[str, Any]:
    """Return the values of a row by column, with its JSON decoded. Raises DataError."""
    for column, value in record.items():
        if isinstance(value, bytes):
            raise DataError(
                f"{where}: column {column!r} holds bytes (a BLOB), which no row can have; name the columns to read "
                "in a query: ?query=SELECT ... ORDER BY ..."
            )
        if column in selection.json_columns and isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                record[column] = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: column {column!r} is not valid JSON: {error}; if it is plain text, leave it out of "
                    "sqlite.json_columns"
                ) from None
    return record


def _parsed(address: str) -> tuple[Path, str | None, str | None]:
    """Return file, table and query of an address. Raises DataError."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise DataError(f"sqlite:{address}: names no file")
    name, kind, value = match.groups()
    if kind not in (None, "table", "query") or value == "":
        what = f"?{kind}= is not known" if value else f"nothing follows ?{kind}="
        raise DataError(f"{address}: {what}; write ?table=NAME, or ?query=SELECT ... ORDER BY ...")
    try:
        file = Path(name).expanduser()
    except RuntimeError as error:  # an unknown home directory
        raise DataError(f"{name}: cannot be read: {error}") from error
    return file, value if kind == "table" else None, value if kind == "query" else None


def _connect(file: Path) -> sqlite3.Connection:
    """Open a database so that neither it nor its directory changes."""
    with file.open("rb") as stream:
        has_log = stream.read(20)[18:] == b"\2\2" and _size(_log_of(file)) > 0
    needs_index = has_log and not _beside(file, "shm").exists()
    if needs_index:  # no program has it open; SQLite would make the index of the log, a file, for all of them
        options = f"mode=ro&vfs={'win32' if os.name == 'nt' else 'unix'}-none"
    elif has_log or _beside(file, "journal").exists():
        options = "mode=ro"
    else:
        options = "immutable=1"  # without locks, and without the files that SQLite makes even to read a log
    database = sqlite3.connect(f"{file.absolute().as_uri()}?{options}", uri=True, check_same_thread=False)
    try:
        if needs_index:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")  # the index is in memory then
        database.execute("PRAGMA query_only=ON")
        database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # ATTACH would create a file
    except BaseException:
        database.close()
        raise
    return database


def _find_table(table: str | None, database: sqlite3.Connection, name: str) -> str:
    """Return the name of the table as it was declared; without one, the only table. Raises DataError."""
    found = database.execute("SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name")
    kinds = {one: kind for one, kind in found if not one.startswith("sqlite_")}
    tables = [one for one, kind in kinds.items() if kind == "table"]
    shown = f"{', '.join(tables[:_MOST_SHOWN])}{', ...' if len(tables) > _MOST_SHOWN else ''}"
    if not tables and not kinds:
        raise DataError(f"{name}: holds no table")
    if table is None:
        if len(tables) != 1:
            raise DataError(f"{name}: holds the tables {shown}; choose one, as in sqlite:{name}?table={tables[0]}")
        return str(tables[0])
    declared: str | None = next((one for one in kinds if one.lower() == table.lower()), None)
    if declared is None:
        raise DataError(f"{name}: no table {table!r}; it has {shown}")
    if kinds[declared] == "view":
        raise DataError(
            f"{name}: {table!r} is a view, whose rows have no order; give one: "
            f"sqlite:{name}?query=SELECT * FROM {declared} ORDER BY ..."
        )
    return declared


def _select_table(table: str, database: sqlite3.Connection, name: str) -> tuple[str, str, set[str]]:
    """Return the SQL that reads a table in order, the unit of its locations, and its columns of JSON."""
    info = database.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
    declared = {str(column) for _, column, kind, *_ in info if str(kind).upper() == "JSON"}
    names = {str(column).lower() for _, column, *_ in info}
    rowid = next((one for one in _ROWID_NAMES if one not in names), None)
    if rowid is not None:
        sql = f"SELECT {rowid}, * FROM {_quoted(table)} ORDER BY {rowid} LIMIT -1 OFFSET ?"
        try:
            database.execute(sql, (0,)).close()
            return sql, "rowid", declared
        except sqlite3.OperationalError as error:
            if "no such column" not in str(error):
                raise
    keys = [str(column) for _, column, *_, place in sorted(info, key=lambda row: row[5]) if place]
    if not keys:
        raise DataError(f"{name}: the rows of {table!r} have no order; give one: ?query=SELECT ... ORDER BY ...")
    order = ", ".join(map(_quoted, keys))
    return f"SELECT * FROM {_quoted(table)} ORDER BY {order} LIMIT -1 OFFSET ?", "row", declared


def _check_query(query: str, name: str) -> None:
    """Raise DataError unless the text is a query with an order."""
    code = _NO_CODE.sub(" ", query).strip()
    if not re.match(r"(select|with|values)\b", code, re.IGNORECASE):
        raise DataError(f"{name}: the query {_short(query)!r} does not begin with SELECT or WITH; it may only read")
    while (outer := re.sub(r"\([^()]*\)", " ", code)) != code:
        code = outer
    if not re.search(r"\border\s+by\b", code, re.IGNORECASE):
        raise DataError(
            f"{name}: the query {_short(query)!r} has no ORDER BY, and a resumed run needs the same order of rows; end "
            "it with ORDER BY and a column that tells all rows apart"
        )


def _check_sql(selection: _Selection, database: sqlite3.Connection, address: str) -> None:
    """Raise DataError for wrong SQL, without running it."""
    try:
        database.execute(f"EXPLAIN {selection.sql}", (0,) if selection.can_skip else ()).close()
    except (sqlite3.OperationalError, sqlite3.ProgrammingError, sqlite3.Warning) as error:
        if "locked" in str(error):
            raise
        raise DataError(f"{selection.path}: {error}") from error


def _explain(error: Exception, file: Path) -> str:
    """Return the message of an error of SQLite with what can be done about it."""
    if "locked" in str(error):
        return f"{error}: another program is writing to it; wait for its end, or give the run a copy"
    if _beside(file, "journal").exists():
        return f"{error}; a program that was writing to it did not end: open it once with that program, or with sqlite3"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _beside(file: Path, kind: str) -> Path:
    """Return the path of a file that SQLite keeps beside a database: `wal`, `shm` or `journal`."""
    return file.with_name(f"{file.name}-{kind}")


def _log_of(file: Path) -> Path:
    """Return the path of a database's write-ahead log."""
    return _beside(file, "wal")


def _state(file: Path) -> State:
    return tuple(
        (status.st_size, status.st_mtime_ns, status.st_ino) if _size(part) and (status := part.stat()) else None
        for part in (file, _log_of(file))
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _short(query: str) -> str:
    """Return the query on one line; a long one is cut, with a hash that tells it from others."""
    line = " ".join(query.split())
    if len(line) <= _LONGEST_NAME:
        return line
    return f"{line[: _LONGEST_NAME // 2]}... {hashlib.sha256(line.encode()).hexdigest()[:6]}"
