"""What a template writes, as its contract reads it: conversations to be written, and the text that came of them.

Segments are encoded one by one, so that what holds for their characters holds for their tokens.
"""

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


# No content stands in another one, nor in what a template might write by itself; none has white space at its ends,
# which a template may take off.
_ROUNDS: Final = (
    ("user", "Which metal melts in the hand?"),
    ("assistant", "Gallium does,\nat 29.8 degrees."),
    ("user", "北京在哪里？"),
    ("assistant", "在中国的北方。"),
    ("user", "Thank you for both 🙂"),
    ("assistant", "You're welcome!"),
)
PLAIN: Final = (_conversation(*_ROUNDS[:2]), _conversation(*_ROUNDS), *CONVERSATIONS)
_SYSTEM: Final = ("system", "Reply as a chemist would.")
_TOOL: Final = {
    "type": "function",
    "function": {"name": "melting_point", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}},
}
SPECIAL: Final = (
    _conversation(_SYSTEM, *_ROUNDS[:2]),
    dataclasses.replace(_conversation(*_ROUNDS[:4]), tools=(_TOOL,), extras={"topics": ["metals", "cities"]}),
    _conversation(*_ROUNDS[:2], ("tool", '{"celsius": 29.8}'), _ROUNDS[5]),
    _conversation(*_ROUNDS[:2], ("narrator", "A pause."), _ROUNDS[5]),
    _conversation(("user", ""), ("assistant", "")),
    _conversation(*_ROUNDS[1:3]),
    _conversation(_ROUNDS[0], _ROUNDS[2], _ROUNDS[4]),
    Conversation(()),
)
"""Conversations that a template may refuse, with DataError: other roles, turns in another order, tools."""


def asked_of(conversation: Conversation) -> Conversation:
    """The conversation as it is when an answer is asked for: without the last one."""
    messages = conversation.messages
    answered = bool(messages) and messages[-1].role == "assistant"
    return dataclasses.replace(conversation, messages=messages[:-1]) if answered else conversation


class Written:
    """Segments side by side: their text, and for each character the segment that it is of."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.text = "".join(segment.text for segment in segments)
        self.owners = [segment for segment in segments for _ in segment.text]

    def contents(self, conversation: Conversation) -> list[tuple[Message, list[Segment], list[Segment]]]:
        """For each turn in which something is said: the turn, its content's segments, and the segments after it."""
        found, end = [], 0
        for message in conversation.messages:
            start = self.text.index(message.content, end)
            end = start + len(message.content)
            found.append((message, self.owners[start:end], self.owners[end:]))
        return found


@dataclass
class TemplateCase:
    kit: Kit
    template: Template

    @property
    def encoder(self) -> Encoder:
        return self.kit.encoder

    @property
    def methods(self) -> dict[str, Callable[[Conversation], Sequence[Segment]]]:
        """Both ways to write a conversation; the one that asks leaves the last answer out."""
        return {
            "render": self._render,
            "generation_prompt": lambda conversation: self.template.generation_prompt(asked_of(conversation)),
        }

    def _render(self, conversation: Conversation) -> Sequence[Segment]:
        """As a run asks for it: where history is rewritten, with the last of the trained turns alone trained."""
        trained = [n for n, message in enumerate(conversation.messages) if message.trained]
        if self.template.rewrites_history and trained:
            messages = (
                message if n == trained[-1] else dataclasses.replace(message, trainable=False)
                for n, message in enumerate(conversation.messages)
            )
            conversation = dataclasses.replace(conversation, messages=tuple(messages))
        return self.template.render(conversation)

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """Those that every template writes, and what this one writes besides; copies, should it change them."""
        return copy.deepcopy((*PLAIN, *self._accepted))

    @cached_property
    def _accepted(self) -> tuple[Conversation, ...]:
        return tuple(conversation for conversation in SPECIAL if self.writes(conversation))

    @property
    def answered(self) -> tuple[Conversation, ...]:
        """Conversations with different contents: an answer, three of them, and one with a system turn if it may be."""
        distinct = (*PLAIN[:2], *(conversation for conversation in self._accepted if conversation in SPECIAL[:1]))
        return copy.deepcopy(distinct)

    def writes(self, conversation: Conversation) -> bool:
        """Whether the template takes it; False when it refuses it with DataError."""
        try:
            for method in self.methods.values():
                method(copy.deepcopy(conversation))
        except DataError:
            return False
        return True

    def can_be_spelled(self, token: str) -> bool:
        """Whether this tokenizer can write the token's text as text; if not, a row that holds it is refused."""
        try:
            self.encoder.plain(token)
        except DataError:
            return False
        return True

    def written(self) -> Iterator[tuple[str, Sequence[Segment]]]:
        """Everything that it writes of the conversations, and the name of the method that wrote it."""
        for name, method in self.methods.items():
            yield from ((name, method(conversation)) for conversation in self.conversations)

    def trained_units(self, conversation: Conversation) -> Iterator[tuple[Conversation, Written]]:
        """What a run makes examples of: the whole, or each trained turn with what led to it, rewritten."""
        for unit in split_units(mark_trained(conversation, DataConfig()), self.encoder):
            assert isinstance(unit, Conversation)
            yield unit, Written(self.template.render(unit))


def difference(one: Sequence[str], other: Sequence[str]) -> str:
    """Where two texts, or two lists of tokens, differ for the first time, with a little around it."""
    at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    border, reach = ("", 20) if isinstance(one, str) else ("|", 6)
    around = slice(max(0, at - reach), at + reach)
    return f"{border.join(one[around])!r} and {border.join(other[around])!r}"
