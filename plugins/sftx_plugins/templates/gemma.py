r"""Gemma: `<start_of_turn>user\n...<end_of_turn>\n<start_of_turn>model\n...<end_of_turn>\n`, after one <bos>.

The system text is written before the first user text, as in Gemma 3's own template; that of Gemma 1 and 2 refuses one.
White space around a turn's text is stripped, as these templates do, but not around the system text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sftx import Conversation, Segment
from sftx_plugins.templates.native import JINJA_SYSTEM_AND_TURNS, NativeTemplate, split_system_and_turns

BEGIN, START, END = "<bos>", "<start_of_turn>", "<end_of_turn>"


@dataclass(frozen=True, eq=False)
class Gemma(NativeTemplate):
    """Turns of user and model; the model's text, <end_of_turn> and newline are trained."""

    controls = frozenset({BEGIN, START, END})
    stop = (END,)
    answer_prompt = f"{START}model\n"
    jinja = (
        JINJA_SYSTEM_AND_TURNS
        + r"""
    {{ '<bos>' }}
    {% for message in turns %}
        {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
        {% if loop.first and system is not none %}{{ system + '\n\n' }}{% endif %}
        {{ thought(message) }}{{ message.content | trim + '<end_of_turn>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
    """
    )

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        system, turns = split_system_and_turns(conversation, type(self).__name__)
        yield Segment(BEGIN, control=True)
        for message in turns:
            turn = self._turn(message)
            yield from turn.markup(f"{START}{'model' if message.role == 'assistant' else 'user'}\n", trained=False)
            if system is not None and message is turns[0]:
                yield from self._turn(system).content(system.content)
                yield from turn.markup("\n\n", trained=False)
            yield from turn.reasoning(message.reasoning)
            yield from turn.content(message.content.strip())
            yield from turn.markup(f"{END}\n")
