"""`{"conversations": [{"from": "human", "value": ...}, ...], "system": ...}`: the form of ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from sftx import Conversation, DataError, Location, Message, Parser, Record, hookimpl
from sftx_plugins import _turns


@dataclass(frozen=True, eq=False)
class ShareGPT:
    """Conversations as turns `from` human, gpt and system, each with a `value`."""

    fields: ClassVar[str] = "conversations (system)"
    samples: ClassVar[Sequence[Record]] = (
        {"conversations": [{"from": "human", "value": "What is 2 + 3?"}, {"from": "gpt", "value": "5"}]},
        {
            "system": "Answer in one word.",
            "conversations": [
                {"from": "human", "value": "The capital of France?"},
                {"from": "gpt", "value": "Paris"},
                {"from": "human", "value": "And of Italy?"},
                {"from": "gpt", "value": "Rome"},
            ],
        },
    )
    roles: ClassVar[Mapping[str, str]] = {
        "human": "user",
        "gpt": "assistant",
        "system": "system",
        "user": "user",
        "assistant": "assistant",
    }

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "conversations" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        messages: list[Message] = []
        system = _turns.optional_text(record, "system", where)
        if system:
            messages.append(Message("system", system))
        for number, turn in enumerate(_turns.list_of(record.get("conversations"), "conversations", where)):
            at = f"conversations[{number}]"
            if not isinstance(turn, dict):
                raise DataError(f"{where}: {at} is {_turns.kind(turn)}, expected an object with from and value")
            role = _turns.role(turn.get("from"), f"{at}.from", where, self.roles)
            messages.append(Message(role, _turns.text(turn.get("value"), f"{at}.value", where)))
        return (Conversation(tuple(messages)),)
