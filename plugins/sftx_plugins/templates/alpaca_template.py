"""Alpaca: `system### Instruction:\\n...\\n\\n### Response:\\n...`: plain text, and the tokenizer's end of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from sftx import Conversation, Message, Segment
from sftx_plugins.templates.native import ROUNDS, Bordered, Turn, rounds

_JINJA: Final = (
    ROUNDS
    + """
    {{ $begin }}{{ (system if system is not none else $default) or '' }}
    {% for message in turns %}
        {% if message.role == 'user' %}
            {% if not loop.first %}{{ '\\n\\n' }}{% endif %}
            {{ '### Instruction:\\n' + message.content + '\\n\\n' }}
        {% else %}{{ '### Response:\\n' }}{{ thought(message) }}{{ message.content + $end }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}
"""
)


@dataclass(frozen=True, eq=False)
class AlpacaTemplate(Bordered):
    """Headings in plain text, as Stanford's Alpaca has them; the response and the end of text are trained."""

    default_system: Annotated[
        str | None,
        Field(description="Text before conversations that begin without a system turn; null adds none."),
    ] = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, begin=self.begin, end=self.end, default=self.default_system)

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = rounds(conversation, "AlpacaTemplate")
        first = system or Message("system", self.default_system or "")
        yield from Turn(self.controls, "").opening(self.begin)
        yield from self._turn(first).says(first.content)
        for number, message in enumerate(turns):
            turn = self._turn(message)
            if message.role == "user":
                yield from turn.opening(("\n\n" if number else "") + "### Instruction:\n")
                yield from turn.says(message.content)
                yield from turn.opening("\n\n")
            else:
                yield from turn.opening("### Response:\n")
                yield from turn.thinks(message.reasoning)
                yield from turn.says(message.content)
                yield from turn.words(self.end)

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening("### Response:\n")
