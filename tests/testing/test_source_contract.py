"""Tests of the source contract: good sources, and bad ones that break one clause each."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import DataError, Location, hookimpl
from sftx.testing import ContractError, check_source
from sftx.testing.kit import built_in
from sftx.testing.source import SUITE


class Lines:
    """Reads a file of JSON lines; the classes below change one thing."""

    scheme: Any = "lines"

    @hookimpl
    def sftx_source(self) -> Any:
        return type(self)()

    def check(self, address: str) -> None:
        if not Path(address).is_file():
            raise DataError(f"{address}: no such file")

    def rows(self, address: str, start: int) -> Iterator[Any]:
        with Path(address).open(encoding="utf-8") as lines:
            for number, line in itertools.islice(enumerate(lines, 1), start, None):
                yield Location(address, number), json.loads(line)

    def fingerprint(self, address: str) -> Any:
        return hashlib.sha256(Path(address).read_bytes()).hexdigest()

    def example(self, directory: Path, texts: Sequence[str]) -> Any:
        file = directory / "rows.jsonl"
        file.write_text("".join(json.dumps({"prompt": "?", "completion": text}) + "\n" for text in texts))
        return str(file)


class GivesNone(Lines):
    @hookimpl
    def sftx_source(self) -> Any:
        return None


class NoScheme(Lines):
    scheme = "C"


class TakenScheme(Lines):
    scheme = "https"


class NoExample(Lines):
    example = None

    def __getattribute__(self, name: str) -> Any:
        if name == "example":
            raise AttributeError(name)
        return super().__getattribute__(name)


class AcceptsAll(Lines):
    def check(self, address: str) -> None: ...


class RaisesOthers(Lines):
    def check(self, address: str) -> None:
        Path(address).stat()


class RefusesItsOwn(Lines):
    def check(self, address: str) -> None:
        raise DataError(f"{address}: is not liked")


class GivesRecords(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        return (record for _, record in super().rows(address, start))


class GivesTuples(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        return ((where, record | {"ids": [(1, 2)]}) for where, record in super().rows(address, start))


class LosesRows(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        return itertools.islice(super().rows(address, start), 5)


class LosesText(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        return (
            (where, record | {"completion": record["completion"].encode("ascii", "ignore").decode()})
            for where, record in super().rows(address, start)
        )


class OnePlace(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        return ((Location(address, 1), record) for _, record in super().rows(address, start))


class Shuffles(Lines):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def rows(self, address: str, start: int) -> Iterator[Any]:
        turn = next(self.calls)
        for where, record in super().rows(address, start):
            yield where, record | {"turn": turn}


class SkipsTooFew(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        return super().rows(address, max(0, start - 1))


class FailsAtTheEnd(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        rows = list(super().rows(address, 0))
        if start > len(rows):
            raise DataError(f"{address}: has {len(rows)} rows")
        return iter(rows[start:])


class HashesTheSize(Lines):
    def fingerprint(self, address: str) -> Any:
        return str(Path(address).stat().st_size)


class Counts(Lines):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def fingerprint(self, address: str) -> Any:
        return str(next(self.calls))


class GivesNumber(Lines):
    def fingerprint(self, address: str) -> Any:
        return hash(Path(address).read_bytes())


class WritesBeside(Lines):
    def rows(self, address: str, start: int) -> Iterator[Any]:
        Path(f"{address}.index").touch()
        return super().rows(address, start)


class KeepsOpen(Lines):
    kept: ClassVar[list[Any]] = []

    def rows(self, address: str, start: int) -> Iterator[Any]:
        self.kept.append(Path(address).open(encoding="utf-8"))  # noqa: SIM115
        return super().rows(address, start)


BAD = [
    (GivesNone, "made", "is its `return` missing?"),
    (NoScheme, "made", "scheme is 'C', expected two or more lower-case letters"),
    (TakenScheme, "made", "scheme is 'https', which is kept for sftx itself"),
    (NoExample, "made", "has no method example(directory, texts)"),
    (AcceptsAll, "checks", "accepts a source that was removed"),
    (RaisesOthers, "checks", "FileNotFoundError"),
    (RefusesItsOwn, "checks", "is not liked"),
    (GivesRecords, "reads", "expected a pair of a Location and a row"),
    (GivesTuples, "reads", "the row['ids'][0] is of type tuple, which is no JSON value"),
    (LosesRows, "reads", "7 texts, and 5 rows came of it"),
    (LosesText, "reads", "does not contain its text '北京是中国的首都。', complete"),
    (OnePlace, "places", "7 rows have the place "),
    (Shuffles, "repeats", "read in an order that the data determine"),
    (SkipsTooFew, "skips", "a resumed run would train rows twice"),
    (FailsAtTheEnd, "skips", "has 7 rows"),
    (HashesTheSize, "fingerprints", "one letter was changed and the fingerprint was not"),
    (Counts, "fingerprints", "two fingerprints of the same source differ"),
    (GivesNumber, "fingerprints", "expected some text, or None"),
    (WritesBeside, "leaves-the-source", "rows.jsonl.index is not what it was"),
    (KeepsOpen, "closes", "rows.jsonl is still open"),
]


@pytest.mark.parametrize("plugin", [Lines(), built_in("sqlite"), built_in("sqlite", json_columns=["messages"])])
def test_good_sources_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_source_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)
    for stream in KeepsOpen.kept:
        stream.close()


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_source_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)
    for stream in KeepsOpen.kept:
        stream.close()


def test_each_clause_has_a_bad_source() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])


def test_a_source_that_cannot_know_whether_rows_change_is_exempt() -> None:
    class Unknown(Lines):
        def fingerprint(self, address: str) -> Any:
            return None

    states = {finding.clause: finding.status for finding in SUITE.findings(Unknown())}
    assert states.pop("fingerprints") == "exempt"
    assert set(states.values()) == {"ok"}


def test_a_source_without_an_example_is_checked_at_an_address(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    check_source(NoExample(), address=str(file))
    with pytest.raises(ContractError, match="a resumed run would train rows twice"):
        check_source(SkipsTooFew(), address=str(file))
    with pytest.raises(ContractError, match="no such file"):
        check_source(Lines(), address=str(tmp_path / "other.jsonl"))
