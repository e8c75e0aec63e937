"""`{"messages": [{"role": ..., "content": ...}, ...]}`: the form of OpenAI and TRL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sftx import Conversation, DataError, Location, Parser, Record, hookimpl
from sftx_plugins import _turns


@dataclass(frozen=True, eq=False)
class Messages:
    """Conversations as a list of messages with the roles system, user, assistant and tool."""

    fields: ClassVar[str] = "messages"

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "messages" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        if record.get("tools"):
            raise DataError(f"{where}: tools cannot be trained on yet; write them into the system message")
        return (Conversation(_turns.messages(record.get("messages"), "messages", where)),)
