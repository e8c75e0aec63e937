r"""MA-RLHF: `BOS\n#SYSTEM:...\n#USER:...\n#ASSISTANT:...EOS`, with role tags as plain text, as its course trains.

A tag is a newline, `#`, the role in capitals and a colon; the turn's text follows directly. The text begins with the
tokenizer's bos token if it has one; an answer ends with its eos token, and nothing follows that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftx import Conversation, Segment
from sftx_plugins.templates.native import BosEosTemplate, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class MaRlhf(BosEosTemplate):
    """#SYSTEM:, #USER: and #ASSISTANT: on lines of their own; the answer and the eos token are trained."""

    answer_prompt = "\n#ASSISTANT:"
    jinja = r"""
    {{ $bos }}
    {% for message in messages %}
        {{ '\n#' + message.role | upper + ':' }}{{ thought(message) }}{{ message.content }}
        {% if message.role == 'assistant' %}{{ $eos }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '\n#ASSISTANT:' }}{% endif %}
    """

    def _bos(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return tokenizer.bos_token or ""

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        yield from Turn(self.controls, "").markup(self.bos)
        for message in conversation.messages:
            turn = self._turn(message)
            yield from turn.markup(f"\n#{message.role.upper()}:", trained=False)
            yield from turn.reasoning(message.reasoning)
            yield from turn.content(message.content)
            if message.role == "assistant":
                yield from turn.markup(self.eos)
