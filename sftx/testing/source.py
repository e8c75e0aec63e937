"""The contract of a source: the same rows in the same order at any time, from any row on, each with its place."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from sftx.assembly.stages.data_stages import RowSourceStage
from sftx.errors import DataError, PluginError
from sftx.testing.clauses import ClauseError, ExemptError, Suite, must_not_raise
from sftx.testing.kit import Kit, make_stage
from sftx.testing.observer_case import workplace
from sftx.types import Location, Record

Rows: TypeAlias = list[tuple[Location, Record]]

TEXTS: Final = (
    "The first row.",
    'A comma, "quotes" and an apostrophe\'s end',
    "北京是中国的首都。",
    "100 % of [this]; is = plain? text & more",
    "The first row.",
    "ünï¢ødé 🙂",
    "The last row.",
)
"""The texts of the rows of an example: on one line each, and two of them equal."""
_OPEN_FILES: Final = Path("/proc/self/fd")


class _Case:
    def __init__(self, kit: Kit, address: str | None = None) -> None:
        self._plugin = kit.plugin
        self._address = address
        self.scheme = self.source().scheme
        if address is None and not hasattr(self._made(), "example"):
            raise ClauseError(
                "it has no method example(directory, texts) that writes a small source to check it with; write one, or "
                "give check_source(plugin, address=...) in a test"
            )

    def _made(self) -> Any:
        return make_stage(self._plugin, "sftx_source")

    def source(self) -> RowSourceStage:
        """Return the source as another run would make it."""
        return RowSourceStage("the source", self._made())

    @contextmanager
    def address(self, texts: Sequence[str] = TEXTS) -> Iterator[tuple[str, Path | None]]:
        """Yield the address of a source with these texts, and its directory; or the given address, without one."""
        if self._address is not None:
            yield self._address, None
            return
        with workplace() as directory:
            yield self.write(directory, texts), directory

    def write(self, directory: Path, texts: Sequence[str]) -> str:
        """Write an example into the directory, in place of an earlier one, and return its address."""
        with must_not_raise(f"example(directory, {len(texts)} texts)", "write the source and return its address"):
            address: object = self._made().example(directory, texts)
        if not isinstance(address, str) or not address:
            raise ClauseError(f"example returned {address!r:.60}; return the address without `{self.scheme}:`")
        return address

    def read(self, address: str, start: int = 0) -> Rows:
        """Return the rows. Raises ClauseError for what a run would refuse."""
        try:
            return list(self.source().rows(address, start))
        except (PluginError, DataError) as error:
            raise ClauseError(f"rows(address, {start}): {error}") from error

    def fingerprint(self, address: str) -> str | None:
        try:
            return self.source().fingerprint(address)
        except (PluginError, DataError) as error:
            raise ClauseError(f"fingerprint(address): {error}") from error


SUITE: Suite[_Case] = Suite("source", _Case)


@SUITE.clause("It accepts the address of a source that is there, and raises DataError for one that is not.")
def checks(case: _Case) -> None:
    with (
        case.address() as (address, directory),
        must_not_raise(f"check({address!r})", "raise only for what is not there"),
    ):
        case.source().check(address)
    if directory is None:
        return
    try:
        case.source().check(address)
    except DataError:
        return
    except PluginError as error:
        raise ClauseError(f"check of a source that was removed: {error}; raise sftx.DataError") from error
    raise ClauseError("check accepts a source that was removed; raise sftx.DataError, before a run loads its model")


@SUITE.clause("It yields a pair of a Location and a row of JSON values for each row, in the order of the source.")
def reads(case: _Case) -> None:
    with case.address() as (address, directory):
        rows = case.read(address)
    if not rows:
        raise ClauseError("rows yielded nothing; yield each row with its place")
    if directory is None:
        return
    if len(rows) != len(TEXTS):
        raise ClauseError(f"the example was written from {len(TEXTS)} texts, and {len(rows)} rows came of it")
    for number, ((_, record), text) in enumerate(zip(rows, TEXTS, strict=True)):
        if text not in _texts(record):
            raise ClauseError(f"row {number + 1} is {record!r:.80} and does not contain its text {text!r}, complete")


@SUITE.clause("Each row has a place of its own, by which errors and the ledger name it.", needs=["reads"])
def places(case: _Case) -> None:
    with case.address() as (address, _):
        names = [str(where) for where, _ in case.read(address)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ClauseError(f"{names.count(repeated[0])} rows have the place {repeated[0]}; number them, for instance")


@SUITE.clause("The rows, their places and their order are the same each time they are read.", needs=["reads"])
def repeats(case: _Case) -> None:
    with case.address() as (address, _):
        _compare(case.read(address), case.read(address), "read again,", "read in an order that the data determine")


@SUITE.clause(
    "`rows(address, start)` yields what follows the first `start` rows, and nothing at their end.", needs=["repeats"]
)
def skips(case: _Case) -> None:
    with case.address() as (address, _):
        whole = case.read(address)
        for start in sorted({1, len(whole) // 2, len(whole) - 1, len(whole), len(whole) + 1}):
            advice = "a resumed run would train rows twice, or leave some out"
            _compare(whole[start:], case.read(address, start), f"read from start={start} on,", advice)


@SUITE.clause("Its fingerprint is the same each time, and another one when a row is changed.", needs=["reads"])
def fingerprints(case: _Case) -> None:
    with case.address() as (address, directory):
        first, again = case.fingerprint(address), case.fingerprint(address)
        if first is None:
            raise ExemptError("it says that it cannot know whether its rows change")
        if first != again:
            raise ClauseError("two fingerprints of the same source differ: nothing would be cached, and no run resumed")
        if directory is None:
            return
        changed = [*TEXTS[:-1], TEXTS[-1].replace("last", "lost")]
        if case.fingerprint(case.write(directory, changed)) == first:
            raise ClauseError("one letter was changed and the fingerprint was not; make it of the data, not of names")


@SUITE.clause("It does not change what it reads.", needs=["checks", "reads", "fingerprints"])
def leaves_the_source(case: _Case) -> None:
    with case.address() as (address, directory):
        if directory is None:
            raise ExemptError("it has no example, whose files could be compared")
        before = _contents(directory)
        source = case.source()
        source.check(address)
        case.read(address)
        case.read(address, 1)
        source.fingerprint(address)
        after = _contents(directory)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise ClauseError(f"after reading, {changed[0]} is not what it was; open it for reading alone")


@SUITE.clause("It closes what it opened, also when rows are left unread.", needs=["checks", "reads", "fingerprints"])
def closes(case: _Case) -> None:
    if not _OPEN_FILES.is_dir():
        raise ExemptError("this system does not tell which files are open")
    with case.address() as (address, _):
        before = set(_open_files())
        source = case.source()
        rows = source.rows(address, 0)
        next(rows)
        rows.close()  # type: ignore[attr-defined]
        source.check(address)
        source.fingerprint(address)
        gc.collect()
        left = [name for name in _open_files() if name not in before]
    if left:
        raise ClauseError(
            f"{left[0]} is still open; open what is read in `rows`, with a `with` statement around `yield`"
        )


def _texts(value: Any) -> str:
    """Return all texts of a row, one a line."""
    if isinstance(value, dict):
        return "\n".join(map(_texts, value.values()))
    if isinstance(value, list):
        return "\n".join(map(_texts, value))
    return value if isinstance(value, str) else ""


def _compare(expected: Rows, found: Rows, how: str, advice: str) -> None:
    """Raise ClauseError unless both are the same rows with the same places."""
    if len(expected) != len(found):
        raise ClauseError(f"{how} there are {len(found)} rows where {len(expected)} were to come; {advice}")
    for (where, record), (other, found_record) in zip(expected, found, strict=True):
        if where != other or json.dumps(record) != json.dumps(found_record):
            what = f"{other} comes where {where} was" if where != other else f"{where} is {found_record!r:.60}"
            raise ClauseError(f"{how} {what}; {advice}")


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def _open_files() -> list[str]:
    """Return what the open file descriptors of this process lead to, but for the list itself."""
    found = []
    for descriptor in os.listdir(_OPEN_FILES):
        try:
            found.append(os.readlink(_OPEN_FILES / descriptor))
        except OSError:  # that of the listing
            continue
    return found


def check_source(plugin: object, *, address: str | None = None) -> None:
    """Check the plugin's source. Raises ContractError, which names the broken clauses.

    `address`: what to read, without its scheme, instead of the source's own `example`. It must have a few rows.
    """
    if address is None:
        SUITE.check(plugin)
        return
    given: Suite[_Case] = Suite(SUITE.hook, lambda kit: _Case(kit, address))
    given.clauses = SUITE.clauses
    given.check(plugin)
