"""Tests of the parser contract: good parsers, and bad ones that break one clause each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import Conversation, DataError, Location, Message, Parsed, PlainText, Record, Tokens, hookimpl
from sftx.config.default_plugins import DEFAULT_PLUGINS
from sftx.testing import ContractError
from sftx.testing.kit import built_in
from sftx.testing.parser import SUITE, check_parser

# --- good parsers ---------------------------------------------------------------------------------


class Pairs:
    """Reads a question, an answer and an optional list of notes."""

    fields: Any = "question, answer (notes)"
    samples: Any = (
        {"question": "What is 2 + 3?", "answer": "5"},
        {"question": "What melts?", "answer": "Gallium.", "notes": ["It is a metal.", "So is iron."]},
    )

    @hookimpl
    def sftx_parser(self) -> Any:
        return self

    def accepts(self, record: Record) -> bool:
        return "question" in record and "answer" in record

    def parse(self, record: Record, where: Location) -> Any:
        question, answer, notes = record.get("question"), record.get("answer"), record.get("notes", [])
        if not isinstance(notes, list):
            raise DataError(f"{where}: notes is {notes!r}, expected a list")
        for text in (question, answer, *notes):
            if not isinstance(text, str):
                raise DataError(f"{where}: {text!r} stands where text is expected")
        return (Conversation((Message("user", "\n".join([question, *notes])), Message("assistant", answer))),)


class Choices(Pairs):
    """Returns two conversations for one record, as a group."""

    samples = ({"question": "What melts in the hand?", "answer": "Gallium.", "rejected": "Iron."},)

    def parse(self, record: Record, where: Location) -> Any:
        worse = record.get("rejected")
        if not isinstance(worse, str):
            raise DataError(f"{where}: rejected is {worse!r}, expected text")
        chosen, *_ = super().parse(record, where)
        return (chosen, Conversation((chosen.messages[0], Message("assistant", worse))))


class Texts(Pairs):
    """Reads text for pre-training."""

    samples = ({"body": "Gallium melts at 29.8 degrees."},)

    def accepts(self, record: Record) -> bool:
        return "body" in record

    def parse(self, record: Record, where: Location) -> tuple[Parsed, ...]:
        if not isinstance(body := record.get("body"), str):
            raise DataError(f"{where}: body is {body!r}, expected text")
        return (PlainText(body, extras={"source": str(where)}),)


class Ids(Pairs):
    """Reads rows that are tokenised already."""

    samples = ({"ids": [5, 6, 7]},)

    def accepts(self, record: Record) -> bool:
        return "ids" in record

    def parse(self, record: Record, where: Location) -> tuple[Parsed, ...]:
        ids = record.get("ids")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise DataError(f"{where}: ids is {ids!r}, expected a list of numbers")
        return (Tokens(tuple(ids), (True,) * len(ids)),)


GOOD = [*map(built_in, DEFAULT_PLUGINS["sftx_parser"]), Pairs(), Choices(), Texts(), Ids()]


@pytest.mark.parametrize("plugin", GOOD, ids=lambda plugin: type(plugin).__name__)
def test_good_parsers_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


# --- bad ones, at least one for each clause ---------------------------------------------------


class GivesNumber(Pairs):
    @hookimpl
    def sftx_parser(self) -> Any:
        return 3


class SaysNothing(Pairs):
    fields = " "


class ListsItsFields(Pairs):
    fields = ("question", "answer")


class HasNoSamples(Pairs):
    samples = ()


class SamplesAreText(Pairs):
    samples = ('{"question": "What is 2 + 3?", "answer": "5"}',)


class SampleHoldsTuple(Pairs):
    samples = ({"question": "What is 2 + 3?", "answer": "5", "notes": ("a", "b")},)


class SampleHoldsSet(Pairs):
    samples = ({"question": "What is 2 + 3?", "answer": "5", "notes": {"a"}},)


class WantsNotes(Pairs):
    def accepts(self, record: Record) -> bool:
        return "notes" in record


class AcceptsWithText(Pairs):
    def accepts(self, record: Record) -> Any:
        return "question" in record and record.get("answer")


class AcceptsAll(Pairs):
    def accepts(self, record: Record) -> bool:
        return True


class AcceptsAnyField(Pairs):
    def accepts(self, record: Record) -> bool:
        return len(record) > 0


class AcceptsByValue(Pairs):
    def accepts(self, record: Record) -> bool:
        return "question" in record and record["question"].endswith("?")


class AcceptsOrNone(Pairs):
    def accepts(self, record: Record) -> Any:
        if not super().accepts(record):
            return False
        return True if record["answer"] else None


class RefusesItsOwn(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        if "notes" not in record:
            raise DataError(f"{where}: no notes")
        return super().parse(record, where)


class ParsesToNothing(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        return super().parse(record, where)[1:]


class ForgetsTuple(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        return super().parse(record, where)[0]


class ParsesToDicts(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        question, answer = super().parse(record, where)[0].messages
        return (Conversation(({"role": "user", "content": question.content}, answer)),)  # type: ignore[arg-type]


class ParsesToRecord(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        return super().parse(record, where) and (dict(record),)


class ParsesToFloats(Ids):
    def parse(self, record: Record, where: Location) -> Any:
        ids, *_ = super().parse(record, where)
        return (Tokens(tuple(float(token) for token in ids.token_ids), ids.loss_mask),)  # type: ignore[attr-defined]


class CallsItBot(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        question, answer = super().parse(record, where)[0].messages
        return (Conversation((question, Message("bot", answer.content))),)


class TrainsNothing(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        question, answer = super().parse(record, where)[0].messages
        return (Conversation((question, Message("assistant", answer.content, trainable=False))),)


class CountsTokensWrongly(Ids):
    def parse(self, record: Record, where: Location) -> Any:
        ids, *_ = super().parse(record, where)
        return (Tokens(ids.token_ids, ids.loss_mask[1:]),)  # type: ignore[union-attr]


class TakesAnswerOut(Pairs):
    def parse(self, record: Any, where: Location) -> Any:
        parsed = super().parse(record, where)
        del record["answer"]
        return parsed


class Numbers(Pairs):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def parse(self, record: Record, where: Location) -> Any:
        return (Conversation(super().parse(record, where)[0].messages, extras={"number": next(self.calls)}),)


class GivesTupleAlong(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        return (Conversation(super().parse(record, where)[0].messages, extras={"span": (0, 5)}),)


class TrustsFields(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        return super().parse({"question": record["question"], "answer": record["answer"]}, where)


class TrustsDepth(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        notes = record.get("notes")
        question = "".join(notes) if isinstance(notes, list) else ""
        return super().parse(dict(record) | ({"notes": [question]} if question else {}), where)


class NamesNoRow(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        return super().parse(record, Location("this row", 0))


class HandsOnNulls(Pairs):
    def parse(self, record: Record, where: Location) -> Any:
        if record.get("answer", "") is None:
            return (Conversation((Message("assistant", None),)),)  # type: ignore[arg-type]
        return super().parse(record, where)


BAD: Sequence[tuple[type, str, str]] = [
    (GivesNumber, "made", "returned int, expected a Parser"),
    (SaysNothing, "describes-its-fields", "`fields` is ' '"),
    (ListsItsFields, "describes-its-fields", "`fields` is ('question', 'answer'); name the fields, such as"),
    (HasNoSamples, "gives-samples", "`samples` is (); give a tuple of one or a few"),
    (SamplesAreText, "gives-samples", "a record is an object with its fields"),
    (SampleHoldsTuple, "gives-samples", "is read from JSON as"),
    (SampleHoldsSet, "gives-samples", "samples[0] cannot be written as JSON: Object of type set"),
    (WantsNotes, "accepts-its-own", "accepts of samples[0] returned False"),
    (AcceptsWithText, "accepts-its-own", "accepts of samples[0] returned '5'; return True"),
    (AcceptsAnyField, "declines-others", "it accepts {'unknown-field': 'word'}; look for the fields"),
    (AcceptsAll, "declines-others", "it accepts {}; look for the fields"),
    (
        AcceptsByValue,
        "declines-others",
        "raised AttributeError: 'NoneType' object has no attribute 'endswith'; look only",
    ),
    (
        AcceptsOrNone,
        "declines-others",
        "accepts returned None for a sample with ['answer'] = None; return True or False",
    ),
    (RefusesItsOwn, "parses-its-samples", "parse of samples[0] raised DataError: rows.jsonl:17: no notes"),
    (ParsesToNothing, "parses-its-samples", "returned nothing; return a tuple"),
    (ForgetsTuple, "parses-its-samples", "returned Conversation"),
    (ParsesToDicts, "parses-its-samples", "Conversation(messages=({'role': 'user'"),
    (ParsesToRecord, "parses-its-samples", "parse gave {'question': "),
    (ParsesToFloats, "parses-its-samples", "Tokens(token_ids=(5.0, 6.0, 7.0)"),
    (GivesTupleAlong, "parses-its-samples", "parse gave extras['span'] = (0, 5) (tuple), which JSON does not hold"),
    (CallsItBot, "trains-something", "samples[0] is dropped: no assistant turn, so nothing to train; give a turn"),
    (TrainsNothing, "trains-something", "samples[0] is dropped: no trained token"),
    (CountsTokensWrongly, "trains-something", "cannot be encoded: 3 token ids and 2 values of the loss mask"),
    (TakesAnswerOut, "pure", "samples[0] was changed; work on a copy"),
    (Numbers, "pure", "={'number': "),
    (
        TrustsFields,
        "names-the-row",
        "samples[0] with ['question'] left out raised PluginError: the parser: parse failed: KeyError",
    ),
    (
        TrustsDepth,
        "names-the-row",
        "samples[1] with ['notes'] = [7] raised PluginError: the parser: parse failed: TypeError",
    ),
    (NamesNoRow, "names-the-row", "does not name the row"),
    (HandsOnNulls, "names-the-row", "['answer'] = None raised PluginError: "),
]


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_parser_fails_its_clause_with_a_message(bad: type, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_parser_fails_nothing_else(bad: type, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_every_clause_of_the_parser_has_a_bad_one() -> None:
    assert_every_clause_is_broken(SUITE, (clause for _, clause, _ in BAD))


def test_check_parser_raises_with_the_clause_and_its_rule() -> None:
    check_parser(Pairs())
    with pytest.raises(ContractError, match="parser / pure: ") as caught:
        check_parser(TakesAnswerOut())
    assert len(caught.value.findings) == 1 + len(SUITE.clauses)
