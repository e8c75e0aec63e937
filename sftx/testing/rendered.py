"""This module holds the conversations that templates are checked with, and reads what a template makes of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Final

from sftx.config.options import DataConfig
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import mark_trained, split_units
from sftx.errors import DataError
from sftx.testing.kit import CONVERSATIONS, Kit
from sftx.types import Conversation, Message, Segment, Template


def _conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns))


# No content is part of another one or of text that a template is likely to add; none has white space at its ends,
# which a template may strip.
_TURNS: Final = (
    ("user", "Which metal melts in the hand?"),
    ("assistant", "Gallium does,\nat 29.8 degrees."),
    ("user", "北京在哪里？"),
    ("assistant", "在中国的北方。"),
    ("user", "Thank you for both 🙂"),
    ("assistant", "You're welcome!"),
)
PLAIN: Final = (_conversation(*_TURNS[:2]), _conversation(*_TURNS), *CONVERSATIONS)
"""Conversations that every template must render."""
_SYSTEM: Final = ("system", "Reply as a chemist would.")
_TOOL: Final = {
    "type": "function",
    "function": {"name": "melting_point", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}},
}
SPECIAL: Final = (
    _conversation(_SYSTEM, *_TURNS[:2]),
    dataclasses.replace(_conversation(*_TURNS[:4]), tools=(_TOOL,), extras={"topics": ["metals", "cities"]}),
    _conversation(*_TURNS[:2], ("tool", '{"celsius": 29.8}'), _TURNS[5]),
    _conversation(*_TURNS[:2], ("narrator", "A pause."), _TURNS[5]),
    _conversation(("user", ""), ("assistant", "")),
    _conversation(*_TURNS[1:3]),
    _conversation(_TURNS[0], _TURNS[2], _TURNS[4]),
    Conversation(()),
)
"""Conversations that a template may refuse with DataError: other roles, turns in another order, tools."""


def without_answer(conversation: Conversation) -> Conversation:
    """Return the conversation without its last turn if the assistant spoke it: the input of `generation_prompt`."""
    messages = conversation.messages
    answered = bool(messages) and messages[-1].role == "assistant"
    return dataclasses.replace(conversation, messages=messages[:-1]) if answered else conversation


class Rendered:
    """The text of a list of segments, and for each character the segment that it belongs to."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.text = "".join(segment.text for segment in segments)
        self.owners = [segment for segment in segments for _ in segment.text]

    def contents(self, conversation: Conversation) -> list[tuple[Message, list[Segment], list[Segment]]]:
        """Return for each turn its message, the owners of its content's characters, and those of all text after it."""
        contents, end = [], 0
        for message in conversation.messages:
            start = self.text.index(message.content, end)
            end = start + len(message.content)
            contents.append((message, self.owners[start:end], self.owners[end:]))
        return contents


@dataclass
class TemplateCase:
    """A template and the conversations that it is checked with."""

    kit: Kit
    template: Template

    @property
    def encoder(self) -> Encoder:
        return self.kit.encoder

    @property
    def methods(self) -> dict[str, Callable[[Conversation], Sequence[Segment]]]:
        """Both methods that render; `generation_prompt` is called without the last answer."""
        return {
            "render": self._render,
            "generation_prompt": lambda conversation: self.template.generation_prompt(without_answer(conversation)),
        }

    def _render(self, conversation: Conversation) -> Sequence[Segment]:
        """Render as a run does: if the template rewrites history, only the last trained turn is trained."""
        trained = [n for n, message in enumerate(conversation.messages) if message.trained]
        if self.template.rewrites_history and trained:
            messages = (
                message if n == trained[-1] else dataclasses.replace(message, trainable=False)
                for n, message in enumerate(conversation.messages)
            )
            conversation = dataclasses.replace(conversation, messages=tuple(messages))
        return self.template.render(conversation)

    @cached_property
    def _accepted(self) -> tuple[Conversation, ...]:
        return tuple(conversation for conversation in SPECIAL if self.accepts(conversation))

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """Copies of PLAIN and of those in SPECIAL that the template accepts."""
        return copy.deepcopy((*PLAIN, *self._accepted))

    @property
    def answered(self) -> tuple[Conversation, ...]:
        """Copies of conversations whose contents all differ: one answer, three answers, and with a system turn."""
        return copy.deepcopy((*PLAIN[:2], *(c for c in self._accepted if c in SPECIAL[:1])))

    def accepts(self, conversation: Conversation) -> bool:
        """Return False when the template refuses the conversation with DataError."""
        try:
            for method in self.methods.values():
                method(copy.deepcopy(conversation))
        except DataError:
            return False
        return True

    def trained_units(self, conversation: Conversation) -> Iterator[tuple[Conversation, Rendered]]:
        """Yield the conversations that a run makes examples of (one per trained turn if history is rewritten)."""
        for unit in split_units(mark_trained(conversation, DataConfig()), self.encoder):
            assert isinstance(unit, Conversation)
            yield unit, Rendered(self.template.render(unit))


def difference(first: Sequence[str], second: Sequence[str]) -> str:
    """Show two texts, or two lists of tokens, around the first place where they differ."""
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    separator, reach = ("", 20) if isinstance(first, str) else ("|", 6)
    around = slice(max(0, at - reach), at + reach)
    return f"{separator.join(first[around])!r} and {separator.join(second[around])!r}"
