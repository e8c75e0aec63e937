"""Vicuna 1.1: `system USER: ... ASSISTANT: ...</s>`, plain text that ends with the tokenizer's eos token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Conversation, Message, Segment
from sftx_plugins.templates.native import JINJA_SYSTEM_AND_TURNS, BosEosTemplate, Turn, split_system_and_turns


@dataclass(frozen=True, eq=False)
class Vicuna(BosEosTemplate):
    """USER: and ASSISTANT: in plain text; the answer with the space before it and the eos token are trained."""

    default_system: Annotated[
        str | None,
        Field(description="Text before conversations that begin without a system turn; null adds none."),
    ] = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    answer_prompt = "ASSISTANT:"
    jinja = (
        JINJA_SYSTEM_AND_TURNS
        + r"""
    {{ $bos }}
    {% set system = system if system is not none else $default_system %}
    {% if system is not none %}{{ system + ' ' }}{% endif %}
    {% for message in turns %}
        {% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}
        {% else %}{{ 'ASSISTANT: ' }}{{ thought(message) }}{{ message.content + $eos }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
    """
    )

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = split_system_and_turns(conversation, "Vicuna")
        if system is None and self.default_system is not None:
            system = Message("system", self.default_system)
        yield from Turn(self.controls, "").markup(self.bos)
        if system is not None:
            yield from self._turn(system).content(system.content)
            yield from self._turn(system).markup(" ", trained=False)
        for message in turns:
            turn = self._turn(message)
            if message.role == "user":
                yield from turn.markup("USER: ", trained=False)
                yield from turn.content(message.content)
                yield from turn.markup(" ", trained=False)
            else:
                yield from turn.markup("ASSISTANT:", trained=False)
                yield from turn.markup(" ")
                yield from turn.reasoning(message.reasoning)
                yield from turn.content(message.content)
                yield from turn.markup(self.eos)
