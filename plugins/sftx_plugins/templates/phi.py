r"""Phi-3 and Phi-3.5: `<|user|>\n...<|end|>\n<|assistant|>\n...<|end|>\n`, and <|endoftext|> after the last turn.

Their tokenizers strip white space after these tokens, so the models never saw it. On a tokenizer that does this, the
template writes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftx import Conversation, Segment
from sftx_plugins.templates.native import NativeTemplate, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, END_OF_TEXT = "<|end|>", "<|endoftext|>"


@dataclass(frozen=True, eq=False)
class Phi(NativeTemplate):
    """One control token for each role; the assistant's text, <|end|>, newline and <|endoftext|> are trained."""

    controls = frozenset({"<|system|>", "<|user|>", "<|assistant|>", END, END_OF_TEXT})
    stop = (END, END_OF_TEXT)
    newline = "\n"
    jinja = r"""
    {% for message in messages %}
        {{ '<|' + message.role + '|>\n' }}{{ thought(message) }}{{ message.content + '<|end|>\n' }}
    {% endfor %}
    {{ '<|assistant|>\n' if add_generation_prompt else '<|endoftext|>' }}
    """

    def _attributes_for(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        end = next((token for token in tokenizer.added_tokens_decoder.values() if token.content == END), None)
        return super()._attributes_for(tokenizer) | {"newline": "" if end is not None and end.rstrip else "\n"}

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        last = conversation.messages[-1] if conversation.messages else None
        turn = Turn(self.controls, "") if last is None or last.role != "assistant" else self._turn(last)
        return (*super().render(conversation), *turn.markup(END_OF_TEXT))

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        for message in conversation.messages:
            turn = self._turn(message)
            yield from turn.markup(f"<|{message.role}|>{self.newline}", trained=False)
            yield from turn.reasoning(message.reasoning)
            yield from turn.content(message.content if self.newline else message.content.lstrip())
            yield from turn.markup(f"{END}{self.newline}")

    def _answer_prompt(self, conversation: Conversation) -> str:
        return f"<|assistant|>{self.newline}"
