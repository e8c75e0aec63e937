"""`{"prompt": ..., "completion": ...}`, each a text or a list of messages: the format of TRL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sftx import Conversation, Location, Message, Parser, Record, hookimpl
from sftx_plugins.parsers import _turns, _values


@dataclass(frozen=True, eq=False)
class PromptCompletion:
    """An untrained prompt and a trained completion; a text is one turn of the user or of the assistant.

    Lists of messages are read as in the format `messages`, with `tools` in a field of its own.
    """

    fields: ClassVar[str] = "prompt, completion (tools)"
    samples: ClassVar[Sequence[Record]] = (
        {"prompt": "What is 2 + 3?", "completion": "5"},
        {
            "prompt": [{"role": "user", "content": "The capital of France?"}],
            "completion": [{"role": "assistant", "content": "Paris"}],
        },
        {"prompt": "把“苹果”翻译成英文。", "completion": "<think>\n水果的名字。\n</think>\n\napple"},
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "prompt" in record and "completion" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        prompt = _side(record.get("prompt"), "prompt", "user", where)
        completion = _side(record.get("completion"), "completion", "assistant", where)
        # An assistant's turn in the prompt is context and is not trained.
        context = tuple(dataclasses.replace(message, trainable=False) for message in prompt)
        return (_turns.conversation((*context, *completion), record, where),)


def _side(value: Any, name: str, role: str, where: Location) -> tuple[Message, ...]:
    if isinstance(value, list):
        return _turns.messages(value, name, where)
    text = _values.text(value, name, where)
    return (_turns.answer(text, name, where) if role == "assistant" else Message(role, text),)
