"""The contract of a parser: it recognises and reads its own records, and names the row that it cannot read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig
from sftx.data.row_encoder import EncodedRow, RowEncoder
from sftx.errors import DataError, SftxError
from sftx.testing.clauses import ClauseError, Suite, must_not_raise
from sftx.testing.kit import Kit, make_stage
from sftx.testing.rendered import difference
from sftx.types import Location, Parsed, Parser

_WHERE: Final = Location("rows.jsonl", 17)
_JSON_VALUES: Final[tuple[Any, ...]] = (None, True, 7, -0.5, "", "word", [], [7], {}, {"other": "word"})
"""One of each kind of JSON value; a row that somebody else wrote may hold any of them."""
_OTHER_RECORDS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"unknown-field": "word"},
    {"": None, "unknown": [{"other": 7}]},
)


@dataclass
class _Case:
    kit: Kit
    parser: Parser

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Copies, so that a parser that changes a record breaks only the clause about that."""
        return [copy.deepcopy(dict(record)) for record in self.parser.samples]

    def parse(self, record: dict[str, Any]) -> Sequence[Parsed]:
        """Parse the record and check the types of the result, as a run does. Raises PluginError for a wrong type."""
        return ParserStage("the parser", self.parser).parse(record, _WHERE)


SUITE: Suite[_Case] = Suite("parser", lambda kit: _Case(kit, make_stage(kit.plugin, "sftx_parser")))


@SUITE.clause("`fields` describes a record of the format; a run lists it when no format fits a row.")
def describes_its_fields(case: _Case) -> None:
    fields: object = case.parser.fields
    if not isinstance(fields, str) or not fields.strip():
        raise ClauseError(f'`fields` is {fields!r}; name the fields, such as "prompt, completion"')


@SUITE.clause("`samples` holds at least one record of the format, made of JSON values.")
def gives_samples(case: _Case) -> None:
    samples: object = case.parser.samples
    if not isinstance(samples, tuple | list) or not samples:
        raise ClauseError(f"`samples` is {samples!r}; give a tuple of one or a few small records")
    for number, record in enumerate(samples):
        if not isinstance(record, Mapping) or not record:
            raise ClauseError(f"samples[{number}] is {record!r:.80}; a record is an object with its fields")
        try:
            reread = json.loads(json.dumps(dict(record), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ClauseError(f"samples[{number}] cannot be written as JSON: {error}") from error
        if reread != record:
            raise ClauseError(f"samples[{number}], {record!r:.80}, is read from JSON as {reread!r:.80}; write it so")


@SUITE.clause("It accepts each of its samples.", needs=["gives-samples"])
def accepts_its_own(case: _Case) -> None:
    for number, record in enumerate(case.samples):
        accepted: object = case.parser.accepts(record)
        if accepted is not True:
            raise ClauseError(f"accepts of samples[{number}] returned {accepted!r}; return True for its fields")


@SUITE.clause(
    "It does not accept an empty record or one with other fields, and returns True or False for any values.",
    needs=["accepts-its-own"],
)
def declines_others(case: _Case) -> None:
    advice = "look only at which fields there are, and leave the values to parse"
    for record in copy.deepcopy(_OTHER_RECORDS):
        with must_not_raise(f"accepts of {record!r:.120}", advice):
            accepted: object = case.parser.accepts(record)
        if accepted is not False:
            raise ClauseError(
                f"it accepts {record!r}; look for the fields of this format, or it takes the rows of all other formats"
            )
    for sample in case.samples:
        for change, record in _changed_records(sample):
            with must_not_raise(f"accepts of {record!r:.120}", advice):
                accepted = case.parser.accepts(record)
            if not isinstance(accepted, bool):
                raise ClauseError(f"accepts returned {accepted!r} for a sample with {change}; return True or False")


@SUITE.clause(
    "Each sample is parsed to at least one Conversation, PlainText or Tokens with values of the declared types.",
    needs=["gives-samples"],
)
def parses_its_samples(case: _Case) -> None:
    advice = "return a tuple of Conversation, PlainText or Tokens"
    for number, record in enumerate(case.samples):
        with must_not_raise(f"parse of samples[{number}]", advice):
            if not case.parse(record):
                raise ClauseError(f"parse of samples[{number}] returned nothing; {advice}")


@SUITE.clause("Each sample has label tokens, with the plugin's own template or ChatML.", needs=["parses-its-samples"])
def trains_something(case: _Case) -> None:
    for number, record in enumerate(case.samples):
        row = EncodedRow(_WHERE)
        try:
            RowEncoder({}, case.kit.encoder, DataConfig()).encode(case.parse(record), row)
        except SftxError as error:
            raise ClauseError(f"samples[{number}] cannot be encoded: {error}") from error
        if not row.examples:
            raise ClauseError(
                f"samples[{number}] is dropped: {row.entries[0].reason}; give a turn the role 'assistant', or "
                "trainable=True, and a content"
            )


@SUITE.clause(
    "Parsing a record again gives the same result, whatever was parsed before, and does not change the record.",
    needs=["parses-its-samples"],
)
def pure(case: _Case) -> None:
    samples = case.samples
    results = [case.parse(record) for record in samples]
    for number, (record, original) in enumerate(zip(samples, case.samples, strict=True)):
        case.parser.accepts(record)
        if record != original:
            raise ClauseError(f"samples[{number}] was changed; work on a copy, and take nothing out with pop")
    again = [case.parse(record) for record in reversed(samples)][::-1]
    for number, (first, second) in enumerate(zip(results, again, strict=True)):
        if first != second:
            raise ClauseError(
                f"parsing samples[{number}] twice gave {difference(repr(first), repr(second))}; keep no state between "
                "two calls, and draw no random numbers"
            )


@SUITE.clause(
    "A record with a wrong or missing value is parsed, or refused with a DataError that names the row.",
    needs=["parses-its-samples"],
)
def names_the_row(case: _Case) -> None:
    advice = 'raise sftx.DataError(f"{where}: ...") saying what is wrong'
    for number, sample in enumerate(case.samples):
        for change, record in _changed_records(sample):
            changed = f"samples[{number}] with {change}"
            with must_not_raise(changed, advice):
                try:
                    case.parse(record)
                except DataError as error:
                    if str(_WHERE) not in str(error):
                        raise ClauseError(
                            f"{changed} was refused with {str(error)!r}, which does not name the row; begin the "
                            'message with f"{where}: "'
                        ) from error


def _changed_records(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the record with one of its values, at any depth, replaced or removed; each with a description of that."""
    for *parents, key in _paths(record):
        name = "".join(f"[{part!r}]" for part in (*parents, key))
        for value in _JSON_VALUES:
            changed, container = _copy(record, parents)
            container[key] = copy.deepcopy(value)
            yield f"{name} = {value!r}", changed
        changed, container = _copy(record, parents)
        del container[key]
        yield f"{name} left out", changed


def _paths(value: Any) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of each value inside `value`, the outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in _paths(inner))


def _copy(record: dict[str, Any], path: Sequence[str | int]) -> tuple[dict[str, Any], Any]:
    """Return a copy of the record, and the object or list of the copy at `path`."""
    copied = copy.deepcopy(record)
    container: Any = copied
    for key in path:
        container = container[key]
    return copied, container


def check_parser(plugin: object) -> None:
    """Check the plugin's parser. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
