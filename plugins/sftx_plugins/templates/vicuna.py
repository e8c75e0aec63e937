"""Vicuna 1.1: `system USER: ... ASSISTANT: ...</s>`, plain text that ends in the tokenizer's end of text."""

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
    {{ $begin }}
    {% set system = system if system is not none else $default %}
    {% if system is not none %}{{ system + ' ' }}{% endif %}
    {% for message in turns %}
        {% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}
        {% else %}{{ 'ASSISTANT: ' }}{{ thought(message) }}{{ message.content + $end }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""
)


@dataclass(frozen=True, eq=False)
class Vicuna(Bordered):
    """USER: and ASSISTANT: in plain text; the answer with the space before it and the end of text are trained."""

    default_system: Annotated[
        str | None,
        Field(description="System text of conversations that begin without one; null adds none."),
    ] = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, begin=self.begin, end=self.end, default=self.default_system)

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = rounds(conversation, "Vicuna")
        if system is None and self.default_system is not None:
            system = Message("system", self.default_system)
        yield from Turn(self.controls, "").opening(self.begin)
        if system is not None:
            yield from self._turn(system).says(system.content)
            yield from self._turn(system).opening(" ")
        for message in turns:
            turn = self._turn(message)
            if message.role == "user":
                yield from turn.opening("USER: ")
                yield from turn.says(message.content)
                yield from turn.opening(" ")
            else:
                yield from turn.opening("ASSISTANT:")
                yield from turn.words(" ")
                yield from turn.thinks(message.reasoning)
                yield from turn.says(message.content)
                yield from turn.words(self.end)

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening("ASSISTANT:")
