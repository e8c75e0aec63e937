"""The contract of a parser: it knows its own records, makes something of them, and names the row it cannot read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sftx.assembly.stages import make
from sftx.config.options import DataConfig
from sftx.data.row_encoder import EncodedRow, RowEncoder
from sftx.errors import DataError, SftxError, one_line
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.kit import Kit
from sftx.testing.rendered import difference
from sftx.types import Conversation, Location, Message, Parsed, Parser, PlainText, Tokens

_WHERE: Final = Location("rows.jsonl", 17)
_VALUES: Final[tuple[Any, ...]] = (None, True, 7, -0.5, "", "word", [], [7], {}, {"other": "word"})
"""One of each kind of JSON value: what stands in a row that somebody else made is any of them."""
_STRANGERS: Final[tuple[dict[str, Any], ...]] = (
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
        """Copies, so that a parser that changes a record breaks one clause and not all."""
        return [copy.deepcopy(dict(record)) for record in self.parser.samples]

    def parse(self, record: dict[str, Any]) -> tuple[Parsed, ...]:
        return self.parser.parse(record, _WHERE)


SUITE: Suite[_Case] = Suite("parser", lambda kit: _Case(kit, make(kit.plugin, "sftx_parser")))


@SUITE.clause("`fields` says what a record of the format looks like: a run lists it where no format fits a row.")
def describes_its_fields(case: _Case) -> None:
    fields: object = case.parser.fields
    if not isinstance(fields, str) or not fields.strip():
        raise ClauseError(f'`fields` is {fields!r}; name the fields, such as "prompt, completion"')


@SUITE.clause("`samples` holds at least one record of the format, of JSON values.")
def gives_samples(case: _Case) -> None:
    samples: object = case.parser.samples
    if not isinstance(samples, tuple | list) or not samples:
        raise ClauseError(f"`samples` is {samples!r}; give a tuple of one or a few small records")
    for number, record in enumerate(samples):
        if not isinstance(record, Mapping) or not record:
            raise ClauseError(f"samples[{number}] is {record!r:.80}; a record is an object with its fields")
        try:
            read = json.loads(json.dumps(dict(record), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ClauseError(f"samples[{number}] cannot be written as JSON: {error}") from error
        if read != record:
            raise ClauseError(f"samples[{number}], {record!r:.80}, is read from JSON as {read!r:.80}; write it so")


@SUITE.clause("It accepts each of its samples.", needs=["gives-samples"])
def accepts_its_own(case: _Case) -> None:
    for number, record in enumerate(case.samples):
        accepted: object = case.parser.accepts(record)
        if accepted is not True:
            raise ClauseError(f"accepts of samples[{number}] returned {accepted!r}; return True for its fields")


@SUITE.clause(
    "It accepts neither an empty record nor one of other fields; whatever the values are, it says True or False.",
    needs=["accepts-its-own"],
)
def declines_others(case: _Case) -> None:
    for record in copy.deepcopy(_STRANGERS):
        if _accepts(case, record) is not False:
            raise ClauseError(
                f"it accepts {record!r}; look for the fields of this format, or it takes the rows of every other one"
            )
    for sample in case.samples:
        for what, record in _broken(sample):
            answer = _accepts(case, record)
            if not isinstance(answer, bool):
                raise ClauseError(f"accepts returned {answer!r} for a sample with {what}; return True or False")


def _accepts(case: _Case, record: Mapping[str, Any]) -> object:
    try:
        return case.parser.accepts(record)
    except Exception as error:
        raise ClauseError(
            f"accepts of {record!r:.120} raised {type(error).__name__}: {one_line(error)}; look only at which fields "
            "there are, and leave the values to parse"
        ) from error


@SUITE.clause(
    "Each sample is parsed to at least one Conversation, PlainText or Tokens, whose values are of their types.",
    needs=["gives-samples"],
)
def parses_its_samples(case: _Case) -> None:
    for number, record in enumerate(case.samples):
        try:
            parsed: object = case.parse(record)
        except Exception as error:
            raise ClauseError(
                f"parse of samples[{number}] raised {type(error).__name__}: {one_line(error)}; a sample is a record "
                "that it can read"
            ) from error
        wrong = _wrong(parsed)
        if wrong or not parsed:
            raise ClauseError(
                f"parse of samples[{number}] returned {wrong or 'nothing'}; return a tuple of Conversation, PlainText "
                "or Tokens"
            )


def _wrong(parsed: Any) -> str:
    """What of a parser's result is of another type than it should be; nothing when all is as promised."""
    if not isinstance(parsed, tuple | list):
        return type(parsed).__name__
    return next((wrong for one in parsed if (wrong := _wrong_one(one))), "")


def _wrong_one(one: Any) -> str:
    if isinstance(one, PlainText):
        return _wrong_field(one, {"text": str, "extras": Mapping})
    if isinstance(one, Conversation):
        expected = {"role": str, "content": str, "trainable": bool | None, "weight": int | float}
        if wrong := _wrong_field(one, {"messages": tuple, "extras": Mapping}):
            return wrong
        others = [f"a message that is a {type(m).__name__}" for m in one.messages if type(m) is not Message]
        return next(filter(None, (*others, *(_wrong_field(message, expected) for message in one.messages))), "")
    if isinstance(one, Tokens):
        ids: tuple[object, ...] = one.token_ids
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            return f"Tokens whose token_ids are {ids!r:.60}"
        return _wrong_field(one, {"token_ids": tuple, "loss_mask": tuple, "extras": Mapping})
    return f"a {type(one).__name__}"


def _wrong_field(one: Any, expected: Mapping[str, Any]) -> str:
    for name, kind in expected.items():
        value = getattr(one, name, None)
        if not isinstance(value, kind):
            return f"a {type(one).__name__} whose {name} is {value!r:.60}"
    return ""


@SUITE.clause(
    "Each sample trains something, with its plugin's own template or with ChatML.", needs=["parses-its-samples"]
)
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
    "A record parsed twice gives the same, whatever was parsed before, and is not changed.",
    needs=["parses-its-samples"],
)
def pure(case: _Case) -> None:
    samples = case.samples
    first = [case.parse(record) for record in samples]
    for number, (record, untouched) in enumerate(zip(samples, case.samples, strict=True)):
        case.parser.accepts(record)
        if record != untouched:
            raise ClauseError(f"samples[{number}] was changed; work on a copy, and take nothing out with pop")
    again = [case.parse(record) for record in reversed(samples)][::-1]
    for number, (one, other) in enumerate(zip(first, again, strict=True)):
        if one != other:
            raise ClauseError(
                f"samples[{number}] was parsed to what has {difference(repr(one), repr(other))}; keep nothing between "
                "two calls, and draw no random numbers"
            )


@SUITE.clause(
    "A record with a wrong or missing value is parsed, or refused with DataError whose message names the row.",
    needs=["parses-its-samples"],
)
def names_the_row(case: _Case) -> None:
    for number, sample in enumerate(case.samples):
        for what, record in _broken(sample):
            who = f"samples[{number}] with {what}"
            advice = 'raise sftx.DataError(f"{where}: ...") saying what is wrong'
            try:
                parsed: object = case.parse(record)
            except DataError as error:
                if str(_WHERE) not in str(error):
                    raise ClauseError(
                        f"{who} was refused with {str(error)!r}, which does not say where the row stands; begin the "
                        'message with f"{where}: "'
                    ) from error
            except Exception as error:
                raise ClauseError(f"{who} raised {type(error).__name__}: {one_line(error)}; {advice}") from error
            else:
                if wrong := _wrong(parsed):
                    raise ClauseError(f"{who} was parsed to {wrong}; {advice}")


def _broken(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The record with one of its values, at any depth, replaced or left out; and in words, what was done."""
    for *parents, last in _places(record):
        name = "".join(f"[{key!r}]" for key in (*parents, last))
        for value in _VALUES:
            copied, inner = _copy(record, parents)
            inner[last] = copy.deepcopy(value)
            yield f"{name} = {value!r}", copied
        copied, inner = _copy(record, parents)
        del inner[last]
        yield f"{name} left out", copied


def _places(value: Any) -> Iterator[tuple[str | int, ...]]:
    """The way to each value within `value`, from the outside in."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in _places(inner))


def _copy(record: dict[str, Any], path: Sequence[str | int]) -> tuple[dict[str, Any], Any]:
    """A copy of the record, and the object or list within it to which `path` leads."""
    copied = copy.deepcopy(record)
    inner: Any = copied
    for key in path:
        inner = inner[key]
    return copied, inner


def check_parser(plugin: object) -> None:
    """Holds the plugin's parser against each clause. Raises ContractError, naming those that it breaks."""
    SUITE.check(plugin)
