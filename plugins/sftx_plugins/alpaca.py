"""`{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[q, a], ...]}`: Stanford Alpaca's form.

`system` and `history` are LLaMA-Factory's additions, and so is the way the input is joined: on a line of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sftx import Conversation, DataError, Location, Message, Parser, Record, hookimpl
from sftx_plugins import _turns


@dataclass(frozen=True, eq=False)
class Alpaca:
    """An instruction, perhaps with an input, and its output; earlier turns in history are trained too."""

    fields: ClassVar[str] = "instruction, output (input, system, history)"
    samples: ClassVar[Sequence[Record]] = (
        {"instruction": "What is 2 + 3?", "output": "5"},
        {
            "system": "Answer in one word.",
            "history": [["The capital of France?", "Paris"]],
            "instruction": "Translate into German.",
            "input": "house",
            "output": "Haus",
        },
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "instruction" in record and "output" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        messages: list[Message] = []
        system = _turns.optional_text(record, "system", where)
        if system:
            messages.append(Message("system", system))
        history = record.get("history")
        for number, pair in enumerate(_turns.list_of([] if history is None else history, "history", where)):
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"{where}: history[{number}] is no pair [question, answer]")
            question, answer = pair
            messages.append(Message("user", _turns.text(question, f"history[{number}][0]", where)))
            messages.append(Message("assistant", _turns.text(answer, f"history[{number}][1]", where)))
        instruction = _turns.text(record.get("instruction"), "instruction", where)
        extra = _turns.optional_text(record, "input", where)
        messages.append(Message("user", f"{instruction}\n{extra}" if extra else instruction))
        messages.append(Message("assistant", _turns.text(record.get("output"), "output", where)))
        return (Conversation(tuple(messages)),)
