r"""Alpaca: `system### Instruction:\n...\n\n### Response:\n...`, plain text that ends with the tokenizer's eos token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Conversation, Message, Segment
from sftx_plugins.templates.native import JINJA_SYSTEM_AND_TURNS, BosEosTemplate, Turn, split_system_and_turns


@dataclass(frozen=True, eq=False)
class AlpacaTemplate(BosEosTemplate):
    """Headings in plain text, as in Stanford's Alpaca; the response and the eos token are trained."""

    default_system: Annotated[
        str | None,
        Field(description="Text before conversations that begin without a system turn; null adds none."),
    ] = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"

    answer_prompt = "### Response:\n"
    jinja = (
        JINJA_SYSTEM_AND_TURNS
        + r"""
    {{ $bos }}{{ (system if system is not none else $default_system) or '' }}
    {% for message in turns %}
        {% if message.role == 'user' %}
            {% if not loop.first %}{{ '\n\n' }}{% endif %}
            {{ '### Instruction:\n' + message.content + '\n\n' }}
        {% else %}{{ '### Response:\n' }}{{ thought(message) }}{{ message.content + $eos }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}
    """
    )

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = split_system_and_turns(conversation, "AlpacaTemplate")
        first = system or Message("system", self.default_system or "")
        yield from Turn(self.controls, "").markup(self.bos)
        yield from self._turn(first).content(first.content)
        for number, message in enumerate(turns):
            turn = self._turn(message)
            if message.role == "user":
                yield from turn.markup(("\n\n" if number else "") + "### Instruction:\n", trained=False)
                yield from turn.content(message.content)
                yield from turn.markup("\n\n", trained=False)
            else:
                yield from turn.markup("### Response:\n", trained=False)
                yield from turn.reasoning(message.reasoning)
                yield from turn.content(message.content)
                yield from turn.markup(self.eos)
