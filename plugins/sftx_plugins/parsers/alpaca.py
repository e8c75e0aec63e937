"""`{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[q, a], ...]}`: the format of Alpaca.

`system`, `history` and `tools` are LLaMA-Factory's additions. As there, the input is joined to the instruction with a
newline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sftx import Conversation, DataError, Location, Message, Parser, Record, hookimpl
from sftx_plugins.parsers import _turns, _values


@dataclass(frozen=True, eq=False)
class Alpaca:
    """An instruction, an optional input, and the output; the answers in `history` are trained too."""

    fields: ClassVar[str] = "instruction, output (input, system, history, tools)"
    samples: ClassVar[Sequence[Record]] = (
        {"instruction": "What is 2 + 3?", "output": "5"},
        {
            "system": "Answer in one word.",
            "history": [["The capital of France?", "Paris"]],
            "instruction": "Translate into German.",
            "input": "house",
            "output": "Haus",
        },
        {"instruction": "用一句话介绍长城。", "input": "", "output": "长城是中国古代的防御工程。"},
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "instruction" in record and "output" in record

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        messages = question(record, where)
        messages.append(_turns.answer(_values.text(record.get("output"), "output", where), "output", where))
        system = _values.optional_text(record, "system", where)
        return (_turns.conversation(_turns.with_system(system, messages, where), record, where),)


def question(record: Record, where: Location) -> list[Message]:
    """Return the turns of `history`, then the instruction with its input. Raises DataError."""
    messages: list[Message] = []
    history = record.get("history")
    for number, pair in enumerate(_values.list_of([] if history is None else history, "history", where)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{where}: history[{number}] is not a pair [question, answer]")
        asked, answer = (_values.text(side, f"history[{number}][{n}]", where) for n, side in enumerate(pair))
        messages += (Message("user", asked), _turns.answer(answer, f"history[{number}][1]", where))
    instruction = _values.text(record.get("instruction"), "instruction", where)
    extra = _values.optional_text(record, "input", where)
    messages.append(Message("user", "\n".join(part for part in (instruction, extra) if part)))
    return messages
