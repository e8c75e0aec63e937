"""`{"conversations": [...], "chosen": {...}, "rejected": {...}}` becomes two conversations (LLaMA-Factory)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from sftx import Conversation, DataError, Location, Message, Record

SIDE: Final = "dpo_side"
"""The key of a conversation's extras whose value is CHOSEN or REJECTED."""
CHOSEN, REJECTED = "chosen", "rejected"
_ROLES: Final[Mapping[str, str]] = {"human": "user", "gpt": "assistant", "system": "system"}


class PairParser:
    """Reads preference pairs: a conversation up to a request, and two answers to it."""

    fields: ClassVar[str] = "conversations, chosen, rejected (system)"
    samples: ClassVar[Sequence[Record]] = (
        {
            "conversations": [{"from": "human", "value": "What is the capital of France?"}],
            "chosen": {"from": "gpt", "value": "The capital of France is Paris."},
            "rejected": {"from": "gpt", "value": "France is a country in Europe, and has many cities."},
        },
        {
            "conversations": [
                {"from": "system", "value": "Answer in one sentence."},
                {"from": "human", "value": "Hello!"},
                {"from": "gpt", "value": "Hello, how can I help?"},
                {"from": "human", "value": "Why is the sky blue?"},
            ],
            "chosen": {"from": "gpt", "value": "Air scatters blue light more than red."},
            "rejected": {"from": "gpt", "value": "Because it reflects the sea. Or not. Who knows?"},
        },
        {
            "system": "You are a careful cook.",
            "conversations": [{"from": "human", "value": "土豆要煮多久？"}],
            "chosen": {"from": "gpt", "value": "大约二十分钟。"},
            "rejected": {"from": "gpt", "value": "三分钟。"},
        },
    )

    def accepts(self, record: Record) -> bool:
        return {"conversations", CHOSEN, REJECTED} <= record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        """Return the chosen conversation, then the rejected one; only the answers are trained. Raises DataError."""
        if record.get("tools"):
            raise DataError(f"{where}: tools cannot be trained on; write them into the system text")
        system = record.get("system")
        context = [] if system in (None, "") else [Message("system", _text(system, "system", where))]
        turns = record.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: conversations is {_shown(turns)}, expected a list of turns")
        context += [_message(turn, f"conversations[{number}]", where) for number, turn in enumerate(turns)]
        if context[-1].role != "user":
            raise DataError(f"{where}: the last turn of conversations is not from human, so there is nothing to answer")
        return tuple(
            Conversation((*context, _answer(record.get(side), side, where)), extras={SIDE: side})
            for side in (CHOSEN, REJECTED)
        )


def _message(turn: Any, name: str, where: Location) -> Message:
    """Return a turn of the context, which is not trained."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: {name} is {_shown(turn)}, expected an object with from and value")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise DataError(f"{where}: {name}.from is {_shown(speaker)}, expected {', '.join(_ROLES)}")
    return Message(_ROLES[speaker], _text(turn.get("value"), f"{name}.value", where), trainable=False)


def _answer(turn: Any, name: str, where: Location) -> Message:
    message = _message(turn, name, where)
    if message.role != "assistant":
        raise DataError(f"{where}: {name}.from is {turn['from']!r}, expected 'gpt'")
    return Message("assistant", message.content, trainable=True)


def _text(value: Any, name: str, where: Location) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_shown(value)}, expected text")
    return value


def _shown(value: Any) -> str:
    """Return a value of a record as an error message shows it."""
    text = repr(value)
    return "missing or null" if value is None else text if len(text) <= 40 else f"{text[:37]}..."
