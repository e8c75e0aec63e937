"""MA-RLHF: `BOS\\n#SYSTEM:...\\n#USER:...\\n#ASSISTANT:...EOS`: role tags as plain text, as its course trains with.

A tag is a newline, `#`, the role in capitals and a colon; what is said follows at once. The text begins with the
tokenizer's beginning of text where it has one; the answer ends in its end of text, and nothing follows that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sftx import Conversation, Segment
from sftx_plugins.templates.native import Bordered, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JINJA: Final = """
    {{ $begin }}
    {% for message in messages %}
        {{ '\\n#' + message.role | upper + ':' }}{{ thought(message) }}{{ message.content }}
        {% if message.role == 'assistant' %}{{ $end }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '\\n#ASSISTANT:' }}{% endif %}
"""


@dataclass(frozen=True, eq=False)
class MaRlhf(Bordered):
    """#SYSTEM:, #USER: and #ASSISTANT: on lines of their own; the answer and the end of text are trained."""

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, begin=self.begin, end=self.end)

    def _begins_with(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return tokenizer.bos_token or ""

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        yield from Turn(self.controls, "").opening(self.begin)
        for message in conversation.messages:
            turn = self._turn(message)
            yield from turn.opening(f"\n#{message.role.upper()}:")
            yield from turn.thinks(message.reasoning)
            yield from turn.says(message.content)
            if message.role == "assistant":
                yield from turn.words(self.end)

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening("\n#ASSISTANT:")
