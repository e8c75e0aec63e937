r"""Zephyr: `<|user|>\n...</s>\n<|assistant|>\n...</s>\n`, with role tags as plain text and the eos token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftx import Conversation, Segment
from sftx_plugins.templates.native import BosEosTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Zephyr(BosEosTemplate):
    """A tag for each role; the assistant's text, the eos token and the newline are trained."""

    answer_prompt = "<|assistant|>\n"
    jinja = r"""
    {% for message in messages %}
        {{ '<|' + message.role + '|>\n' }}{{ thought(message) }}{{ message.content + $eos + '\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
    """

    def _bos(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return ""  # Zephyr was trained without one

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        for message in conversation.messages:
            turn = self._turn(message)
            yield from turn.markup(f"<|{message.role}|>\n", trained=False)
            yield from turn.reasoning(message.reasoning)
            yield from turn.content(message.content)
            yield from turn.markup(f"{self.eos}\n")
