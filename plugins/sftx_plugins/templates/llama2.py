r"""Llama 2: `<s>[INST] <<SYS>>\n...\n<</SYS>>\n\nquestion [/INST] answer </s>`, with <s> before every question.

White space around question and answer is stripped, as in Llama 2's own template, but not around the system text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sftx import Conversation, Segment
from sftx_plugins.templates.native import JINJA_SYSTEM_AND_TURNS, NativeTemplate, split_system_and_turns

BEGIN, END = "<s>", "</s>"


@dataclass(frozen=True, eq=False)
class Llama2(NativeTemplate):
    """Questions between [INST] and [/INST]; the answer with a space around it and </s> are trained."""

    controls = frozenset({BEGIN, END})
    stop = (END,)
    jinja = (
        JINJA_SYSTEM_AND_TURNS
        + r"""
    {% for message in turns %}
        {% if message.role == 'user' %}
            {{ '<s>[INST] ' }}
            {% if loop.first and system is not none %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}
            {{ message.content | trim + ' [/INST]' }}
        {% else %}{{ ' ' }}{{ thought(message) }}{{ message.content | trim + ' </s>' }}
        {% endif %}
    {% endfor %}
    """
    )

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = split_system_and_turns(conversation, "Llama2")
        for number, message in enumerate(turns):
            turn = self._turn(message)
            if message.role == "user":
                yield from turn.markup(f"{BEGIN}[INST] ", trained=False)
                if system is not None and number == 0:
                    yield from turn.markup("<<SYS>>\n", trained=False)
                    yield from self._turn(system).content(system.content)
                    yield from turn.markup("\n<</SYS>>\n\n", trained=False)
                yield from turn.content(message.content.strip())
                yield from turn.markup(" [/INST]", trained=False)
            else:
                yield from turn.markup(" ")
                yield from turn.reasoning(message.reasoning)
                yield from turn.content(message.content.strip())
                yield from turn.markup(f" {END}")
