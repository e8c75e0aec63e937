"""`{"messages": [{"role": ..., "content": ...}, ...]}`: the form of OpenAI and TRL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sftx import Conversation, DataError, Location, Parser, Record, hookimpl
from sftx_plugins import _turns


@dataclass(frozen=True, eq=False)
class Messages:
    """Conversations as a list of messages with the roles system, user, assistant and tool."""

    fields: ClassVar[str] = "messages"
    samples: ClassVar[Sequence[Record]] = (
        {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]},
        {
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": "The capital of France?"},
                {"role": "assistant", "content": "Paris", "weight": 0},
                {"role": "user", "content": "And of Italy?"},
                {"role": "assistant", "content": "Rome", "weight": 0.5},
            ]
        },
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "messages" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        if record.get("tools"):
            raise DataError(f"{where}: tools cannot be trained on yet; write them into the system message")
        return (Conversation(_turns.messages(record.get("messages"), "messages", where)),)
