"""Gemma: `<start_of_turn>user\\n...<end_of_turn>\\n<start_of_turn>model\\n...<end_of_turn>\\n`, after one <bos>.

The system text stands before the first user's, as Gemma 3's own template has it; that of Gemma 1 and 2 refuses one.
White space around what is said is taken off, as these templates do; not around the system text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sftx import Conversation, Segment
from sftx_plugins.templates.native import ROUNDS, Native, Turn, rounds

BEGIN, START, END = "<bos>", "<start_of_turn>", "<end_of_turn>"
_JINJA: Final = (
    ROUNDS
    + """
    {{ '<bos>' }}
    {% for message in turns %}
        {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}
        {% if loop.first and system is not none %}{{ system + '\\n\\n' }}{% endif %}
        {{ thought(message) }}{{ message.content | trim + '<end_of_turn>\\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
)


@dataclass(frozen=True, eq=False)
class Gemma(Native):
    """Turns of user and model; the model's text, <end_of_turn> and newline are trained."""

    controls = frozenset({BEGIN, START, END})
    stop = (END,)

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA)

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = rounds(conversation, type(self).__name__)
        yield Segment(BEGIN, control=True)
        for message in turns:
            turn = self._turn(message)
            yield from turn.opening(f"{START}{'model' if message.role == 'assistant' else 'user'}\n")
            if system is not None and message is turns[0]:
                yield from self._turn(system).says(system.content)
                yield from turn.opening("\n\n")
            yield from turn.thinks(message.reasoning)
            yield from turn.says(message.content.strip())
            yield from turn.words(f"{END}\n")

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening(f"{START}model\n")
