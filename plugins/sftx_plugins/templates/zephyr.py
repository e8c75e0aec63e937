"""Zephyr: `<|user|>\\n...</s>\\n<|assistant|>\\n...</s>\\n`: role tags as plain text, the tokenizer's end of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sftx import Conversation, Segment
from sftx_plugins.templates.native import Native, Turn, end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JINJA: Final = """
    {% for message in messages %}
        {{ '<|' + message.role + '|>\\n' }}{{ thought(message) }}{{ message.content + $end + '\\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}
"""


@dataclass(frozen=True, eq=False)
class Zephyr(Native):
    """A tag for each role; the assistant's text, the end of text and the newline are trained."""

    end = ""

    @property
    def chat_template(self) -> str | None:
        return self._jinja(_JINJA, end=self.end)

    def _known_of(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        end = end_of_text(tokenizer)
        return {"controls": super()._known_of(tokenizer)["controls"] | {end}, "stop": (end,), "end": end}

    def _turns(self, conversation: Conversation) -> Iterator[Segment]:
        for message in conversation.messages:
            turn = self._turn(message)
            yield from turn.opening(f"<|{message.role}|>\n")
            yield from turn.thinks(message.reasoning)
            yield from turn.says(message.content)
            yield from turn.words(f"{self.end}\n")

    def _opening(self, conversation: Conversation) -> Iterator[Segment]:
        return Turn(self.controls, "assistant").opening("<|assistant|>\n")
