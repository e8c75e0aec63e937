"""`{"prompt": ..., "completion": ...}`, each a text or a list of messages: the form of TRL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sftx import Conversation, Location, Message, Parser, Record, hookimpl
from sftx_plugins import _turns


@dataclass(frozen=True, eq=False)
class PromptCompletion:
    """A prompt that is not trained and a completion that is; texts are a turn of the user and of the assistant."""

    fields: ClassVar[str] = "prompt, completion"
    samples: ClassVar[Sequence[Record]] = (
        {"prompt": "What is 2 + 3?", "completion": "5"},
        {
            "prompt": [{"role": "user", "content": "The capital of France?"}],
            "completion": [{"role": "assistant", "content": "Paris"}],
        },
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "prompt" in record and "completion" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        prompt = _side(record.get("prompt"), "prompt", "user", where)
        completion = _side(record.get("completion"), "completion", "assistant", where)
        # An assistant's turn within the prompt is context, not something to learn.
        context = tuple(dataclasses.replace(message, trainable=False) for message in prompt)
        return (Conversation((*context, *completion)),)


def _side(value: Any, name: str, role: str, where: Location) -> tuple[Message, ...]:
    if isinstance(value, list):
        return _turns.messages(value, name, where)
    return (Message(role, _turns.text(value, name, where)),)
