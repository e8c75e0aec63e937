"""Phi-3 and Phi-3.5: `<|user|>\\n...<|end|>\\n<|assistant|>\\n...<|end|>\\n`, and <|endoftext|> after the last turn.

Their tokenizers take the white space after these tokens away, so that the models never saw it; on a tokenizer that
does, none is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sftx import Conversation, Segment
from sftx_plugins.templates.native import Native, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, EOT = "<|end|>", "<|endoftext|>"
ROLES: Final = ("system", "user", "assistant")
_JINJA: Final = """
    {% for message in messages %}
        {{ '<|' + message.role + '|>\\n' }}{{ thought(message) }}{{ message.content + '<|end|>\\n' }}
    {% endfor %}
    {{ '<|assistant|>\\n' if add_generation_prompt else '<|endoftext|>' }}
"""


@dataclass(frozen=True, eq=False)
class Phi(Native):
    """A token for each role; the assistant's text, <|end|>, newline and the end of text are trained."""

    controls = frozenset({*(f"<|{role}|>" for role in ROLES), END, EOT})
    stop = (END, EOT)
    newline = "\n"

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA)

    def _known_of(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        end = next((t for t in tokenizer.added_tokens_decoder.values() if t.content == END), None)
        return super()._known_of(tokenizer) | {"newline": "" if end is not None and end.rstrip else "\n"}

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        last = conversation.messages[-1] if conversation.messages else None
        turn = Turn(self.controls, "") if last is None or last.role != "assistant" else self._turn(last)
        return (*super().render(conversation), *turn.words(EOT))

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        for message in conversation.messages:
            turn = self._turn(message)
            yield from turn.opening(f"<|{message.role}|>{self.newline}")
            yield from turn.thinks(message.reasoning)
            yield from turn.says(message.content if self.newline else message.content.lstrip())
            yield from turn.words(f"{END}{self.newline}")

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening(f"<|assistant|>{self.newline}")
