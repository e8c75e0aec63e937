"""`{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}`: the transcripts of hh-rlhf (Anthropic)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from sftx import Conversation, DataError, Location, Message, Parser, Record, hookimpl
from sftx_plugins.parsers import _turns, _values

_SPEAKER: Final = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True, eq=False)
class HHRLHF:
    """The preferred transcript of each pair; the `rejected` one is not read.

    A turn begins with `Human:` or `Assistant:` after an empty line; white space around its text is stripped. `chosen`
    may also be a list of messages in the format `messages`.
    """

    fields: ClassVar[str] = "chosen (rejected)"
    samples: ClassVar[Sequence[Record]] = (
        {
            "chosen": "\n\nHuman: What is 2 + 3?\n\nAssistant: 5",
            "rejected": "\n\nHuman: What is 2 + 3?\n\nAssistant: Who knows?",
        },
        {
            "chosen": "\n\nHuman: 你好！\n\nAssistant: 你好。"
            "\n\nHuman: 谁写了《红楼梦》？\n\nAssistant: 曹雪芹。\n\n他是清代人。"
        },
        {
            "chosen": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}],
            "rejected": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Seven."}],
        },
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        # In a record with a conversation or a prompt, chosen is only the answer.
        return "chosen" in record and not {"conversations", "prompt"} & record.keys()

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        chosen: Any = record.get("chosen")
        if isinstance(chosen, list):
            return (_turns.conversation(_turns.messages(chosen, "chosen", where), record, where),)
        return (_turns.conversation(transcript(chosen, "chosen", where), record, where),)


def transcript(value: Any, name: str, where: Location) -> tuple[Message, ...]:
    """Return the turns of a text in which `Human:` and `Assistant:` begin a turn each. Raises DataError."""
    before, *pieces = _SPEAKER.split(_values.text(value, name, where).strip())
    if before or not pieces:
        raise DataError(f"{where}: {name} begins with {before[:40]!r}, expected 'Human:' or 'Assistant:'")
    return tuple(
        Message("user", text.strip())
        if speaker == "Human"
        else _turns.answer(text.strip(), f"turn {number} of {name}", where)
        for number, (speaker, text) in enumerate(zip(pieces[::2], pieces[1::2], strict=True), 1)
    )
