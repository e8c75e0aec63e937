"""Llama 2: `<s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\nquestion [/INST] answer </s>`, a <s> before every question.

White space around question and answer is taken off, as Llama 2's own template does; not around the system text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sftx import Conversation, Segment
from sftx_plugins.templates.native import ROUNDS, Native, rounds

BEGIN, END = "<s>", "</s>"
_JINJA: Final = (
    ROUNDS
    + """
    {% for message in turns %}
        {% if message.role == 'user' %}
            {{ '<s>[INST] ' }}
            {% if loop.first and system is not none %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}
            {{ message.content | trim + ' [/INST]' }}
        {% else %}{{ ' ' }}{{ thought(message) }}{{ message.content | trim + ' </s>' }}
        {% endif %}
    {% endfor %}
"""
)


@dataclass(frozen=True, eq=False)
class Llama2(Native):
    """Questions between [INST] and [/INST]; the answer with a space around it and </s> are trained."""

    controls = frozenset({BEGIN, END})
    stop = (END,)

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA)

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = rounds(conversation, "Llama2")
        for number, message in enumerate(turns):
            turn = self._turn(message)
            if message.role == "user":
                yield from turn.opening(f"{BEGIN}[INST] ")
                if system is not None and number == 0:
                    yield from turn.opening("<<SYS>>\n")
                    yield from self._turn(system).says(system.content)
                    yield from turn.opening("\n<</SYS>>\n\n")
                yield from turn.says(message.content.strip())
                yield from turn.opening(" [/INST]")
            else:
                yield from turn.words(" ")
                yield from turn.thinks(message.reasoning)
                yield from turn.says(message.content.strip())
                yield from turn.words(f" {END}")

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        yield from ()  # [/INST] is what an answer follows
