"""Reads preference records: pairs of a better and a worse answer to one question, and single answers with a label.

A pair becomes two conversations of one group, the better one first, and a labelled answer becomes one. The key
`preference` of a conversation's extras says which is which: CHOSEN or REJECTED. Only the answers are trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from sftx import Conversation, DataError, Location, Message, Record
from sftx_plugins.parsers import _turns, _values
from sftx_plugins.parsers.alpaca import question
from sftx_plugins.parsers.hh_rlhf import transcript
from sftx_plugins.parsers.sharegpt import TAGS

PREFERENCE: Final = "preference"
"""The key of an example's extras whose value is CHOSEN or REJECTED."""
CHOSEN: Final = "chosen"
REJECTED: Final = "rejected"

_LABELS: Final = ("label", "kto_tag")
_PAIR: Final = frozenset({CHOSEN, REJECTED})
_RESPONSES: Final = ("response_0", "response_1")
_IDS: Final = ("safer_response_id", "better_response_id")
_QUESTIONS: Final = ("prompt", "conversations", "messages", "instruction")

_PAIRS: Final[tuple[Record, ...]] = (
    {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "Some number."},
    {
        "prompt": [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "A fruit?"}],
        "chosen": [{"role": "assistant", "content": "Pear."}],
        "rejected": [{"role": "assistant", "content": "There are many fruits, pears among them."}],
    },
    {
        "chosen": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}],
        "rejected": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Seven."}],
    },
    {
        "system": "You are a careful cook.",
        "conversations": [{"from": "human", "value": "土豆要煮多久？"}],
        "chosen": {"from": "gpt", "value": "大约二十分钟。"},
        "rejected": {"from": "gpt", "value": "三分钟。"},
    },
    {"instruction": "Translate into German.", "input": "house", "output": ["Haus", "Maus"]},
    {
        "chosen": "\n\nHuman: Hello!\n\nAssistant: Hello.\n\nHuman: Why is snow white?\n\nAssistant: It scatters.",
        "rejected": "\n\nHuman: Hello!\n\nAssistant: Hello.\n\nHuman: Why is snow white?\n\nAssistant: Who knows?",
    },
    {
        "prompt": "May I drive after two glasses of wine?",
        "response_0": "Of course, nobody will notice.",
        "response_1": "No, take a taxi.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    },
)
_LABELLED: Final[tuple[Record, ...]] = (
    {"prompt": "What is 3 + 4?", "completion": "7", "label": True},
    {
        "prompt": [{"role": "user", "content": "Is 91 a prime number?"}],
        "completion": [{"role": "assistant", "content": "Yes, I think so."}],
        "label": False,
    },
    {
        "messages": [
            {"role": "user", "content": "你好！"},
            {"role": "assistant", "content": "你好。"},
            {"role": "user", "content": "谁写了《红楼梦》？"},
            {"role": "assistant", "content": "曹雪芹。"},
        ],
        "label": True,
    },
    {"instruction": "Name a planet.", "input": "", "output": "The moon.", "kto_tag": False},
)


@dataclass(frozen=True)
class PreferenceParser:
    """Reads pairs in the forms of TRL, LLaMA-Factory, hh-rlhf and PKU-SafeRLHF; with `labelled`, single answers too."""

    labelled: bool = False

    has_rejected: ClassVar[bool] = True

    @property
    def fields(self) -> str:
        more = ", label" if self.labelled else ""
        return f"chosen, rejected (prompt, conversations, messages, instruction, system, tools{more})"

    @property
    def samples(self) -> Sequence[Record]:
        return (*_PAIRS, *_LABELLED) if self.labelled else _PAIRS

    def accepts(self, record: Record) -> bool:
        if record.keys() >= _PAIR or {"prompt", *_RESPONSES} <= record.keys():
            return True
        if any(name in record for name in _LABELS):
            return self.labelled and _has_answer(record)
        return {"instruction", "output"} <= record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        """Return the better conversation and the worse one, or the one with its label. Raises DataError."""
        if not _PAIR & record.keys() and any(name in record for name in _LABELS):
            label = _label(record, where)
            context, answer = _labelled(record, where)
            return (_conversation(context, answer, CHOSEN if label else REJECTED, record, where),)
        context, chosen, rejected = _pair(record, where)
        if chosen == rejected:
            raise DataError(
                f"{where}: {CHOSEN} and {REJECTED} are the same answer, so that there is nothing to prefer; remove "
                "such rows, or leave them out with data.invalid_rows=drop"
            )
        return tuple(
            _conversation(context, answer, side, record, where)
            for side, answer in ((CHOSEN, chosen), (REJECTED, rejected))
        )


def _has_answer(record: Record) -> bool:
    fields = record.keys()
    pairs = ({"prompt", "completion"}, {"instruction", "output"}, {"messages"}, {"conversations"})
    return any(needed <= fields for needed in pairs)


# --- pairs --------------------------------------------------------------------------------------


def _pair(record: Record, where: Location) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Return the question, the better answer and the worse one."""
    if not _PAIR & record.keys() and _RESPONSES[0] in record:
        return (_context(record, where), *_by_safety(record, where))
    if not _PAIR & record.keys() and isinstance(answers := record.get("output"), list):
        if len(answers) != 2:
            raise DataError(f"{where}: output is a list of {len(answers)}, expected two answers, the better one first")
        chosen, rejected = (_answer(answer, f"output[{n}]", where) for n, answer in enumerate(answers))
        return _context(record, where), chosen, rejected
    if not _PAIR & record.keys():
        raise DataError(
            f"{where}: is no preference pair: output is {_values.kind(record.get('output'))}, expected a list of two "
            f"answers, the better one first, or the fields {CHOSEN} and {REJECTED}"
        )
    has_question = any(record.get(name) is not None for name in _QUESTIONS)
    sides = []
    for name in (CHOSEN, REJECTED):
        value: Any = record.get(name)
        # A text that has no question beside it is a transcript.
        sides.append(
            _answer(value, name, where)
            if has_question or not isinstance(value, str)
            else transcript(value, name, where)
        )
    if all(side and side[0].role == "assistant" for side in sides):
        return _context(record, where), sides[0], sides[1]
    return _split(sides[0], sides[1], record, where)


def _split(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], record: Record, where: Location
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Return the common beginning of two whole conversations as the question, and what follows in each."""
    if chosen == rejected:
        return (), chosen, rejected
    num = 0
    while num < min(len(chosen), len(rejected)) and chosen[num] == rejected[num]:
        num += 1
    sides = {CHOSEN: chosen, REJECTED: rejected}
    for name, side in sides.items():
        if num == len(side):
            raise DataError(f"{where}: {name} ends where the two begin to differ, so that it has no answer of its own")
    for name, side in sides.items():
        if side[num].role != "assistant":
            raise DataError(
                f"{where}: {name}[{num}] is a turn of the {side[num].role} and differs from the other side's, expected "
                "two answers to one question"
            )
    system = _values.optional_text(record, "system", where)
    return _turns.with_system(system, chosen[:num], where), chosen[num:], rejected[num:]


def _by_safety(record: Record, where: Location) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the better and the worse response of PKU-SafeRLHF: a safe one before one that is not.

    Where both are safe, or the record does not say, `better_response_id` decides, which is about helpfulness; where
    neither is, `safer_response_id` does, if the record has it.
    """
    safe = [_optional_bool(record, f"is_response_{n}_safe", where) for n in range(2)]
    ids = {name: _response_id(record, name, where) for name in _IDS if record.get(name) is not None}
    if None not in safe and safe[0] != safe[1]:
        best = safe.index(True)
        if ids.get(_IDS[0], best) != best:
            raise DataError(
                f"{where}: {_IDS[0]} is {ids[_IDS[0]]}, and is_response_{best}_safe says that the other one is the "
                "safe one; remove such rows, or leave them out with data.invalid_rows=drop"
            )
    else:
        order = _IDS if safe[0] is False else _IDS[::-1]
        name = next((name for name in order if name in ids), None)
        if name is None:
            raise DataError(f"{where}: {_IDS[1]} is missing or null, expected 0 or 1")
        best = ids[name]
    first, second = (_answer(record.get(name), name, where) for name in _RESPONSES)
    return (second, first) if best else (first, second)


def _optional_bool(record: Record, name: str, where: Location) -> bool | None:
    value = record.get(name)
    if not (value is None or isinstance(value, bool)):
        raise DataError(f"{where}: {name} is {_values.shown(value)}, expected true or false")
    return value


def _response_id(record: Record, name: str, where: Location) -> int:
    value: Any = record.get(name)
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"{where}: {name} is {_values.shown(value)}, expected 0 or 1")
    return int(value)


# --- labelled answers ---------------------------------------------------------------------------


def _label(record: Record, where: Location) -> bool:
    """Return whether the answer is good: `label` (TRL) or `kto_tag` (LLaMA-Factory)."""
    labels = {name: record.get(name) for name in _LABELS if record.get(name) is not None}
    for name in labels or _LABELS[:1]:
        if not isinstance(labels.get(name), bool):
            raise DataError(f"{where}: {name} is {_values.shown(record.get(name))}, expected true or false")
    if len(set(labels.values())) > 1:
        raise DataError(f"{where}: {' and '.join(labels)} contradict each other; leave one of them out")
    return bool(next(iter(labels.values())))


def _labelled(record: Record, where: Location) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the question, and the answer that has the label: of a whole conversation its last turn."""
    for name, whole in (("completion", False), ("output", False), ("conversations", True), ("messages", True)):
        if record.get(name) is None:
            continue
        if not whole:
            return _context(record, where), _answer(record[name], name, where)
        turns = _messages(record[name], name, where)
        if not turns or turns[-1].role != "assistant":
            raise DataError(f"{where}: {name} does not end with an answer of the assistant, which the label is about")
        system = _values.optional_text(record, "system", where)
        return _turns.with_system(system, turns[:-1], where), turns[-1:]
    raise DataError(f"{where}: has a label and no answer; expected prompt and completion, or messages")


# --- questions and answers ----------------------------------------------------------------------


def _context(record: Record, where: Location) -> tuple[Message, ...]:
    """Return the turns before the answer: of a prompt, a conversation, or an instruction with its input and history."""
    name = _values.first_key(record, _QUESTIONS)
    value: Any = record.get(name)
    if name == "instruction":
        turns = tuple(question(record, where))
    elif isinstance(value, str) and name == "prompt":
        turns = (Message("user", value),)
    else:
        turns = _messages(value, name, where)
    if not turns or turns[-1].role not in ("user", "tool"):
        raise DataError(f"{where}: {name} does not end with a turn of the user, so that there is nothing to answer")
    return _turns.with_system(_values.optional_text(record, "system", where), turns, where)


def _answer(value: Any, name: str, where: Location) -> tuple[Message, ...]:
    """Return an answer that is a text, a message or a list of messages. Raises DataError."""
    if isinstance(value, dict):
        turns: tuple[Message, ...] = (_message(value, name, where),)
    elif isinstance(value, list):
        turns = _messages(value, name, where)
    else:
        turns = (_turns.answer(_values.text(value, name, where), name, where),)
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: {name} has no turn of the assistant, expected an answer")
    return turns


def _message(value: Any, at: str, where: Location) -> Message:
    is_theirs = isinstance(value, dict) and "from" in value
    roles, contents = (
        (("from", "role"), ("value", "content")) if is_theirs else (("role", "from"), ("content", "value"))
    )
    return _turns.message(value, at, where, tags=TAGS, role_keys=roles, content_keys=contents)


def _messages(value: Any, name: str, where: Location) -> tuple[Message, ...]:
    """Return the messages of a list, each with `role` and `content`, or with `from` and `value` (ShareGPT)."""
    return tuple(
        _message(turn, f"{name}[{number}]", where) for number, turn in enumerate(_values.list_of(value, name, where))
    )


def _conversation(
    context: Sequence[Message], answer: Sequence[Message], side: str, record: Record, where: Location
) -> Conversation:
    """Return the question with one answer, whose turns of the assistant alone are trained."""
    messages = [dataclasses.replace(message, trainable=False) for message in context]
    messages += [
        dataclasses.replace(message, trainable=message.role == "assistant" and message.trainable is not False)
        for message in answer
    ]
    unlabelled = {name: value for name, value in record.items() if name not in _LABELS}
    turns = next((record[name] for name in ("conversations", "messages", CHOSEN) if record.get(name)), ())
    conversation = _turns.conversation(messages, unlabelled, where, turns=turns)
    return dataclasses.replace(conversation, extras={PREFERENCE: side})
