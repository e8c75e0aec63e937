"""A chat template in Jinja becomes a `Template`: what it writes of a conversation, in segments."""

from __future__ import annotations

import datetime
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tokenizers import AddedToken

from sftx import Conversation, PluginError, Segment
from sftx_plugins.templates.jinja.data import LETTER, Verbatim, data_of
from sftx_plugins.templates.jinja.probes import probed
from sftx_plugins.templates.jinja.text import Part, Scanner, fill
from sftx_plugins.templates.jinja.turns import Jinja, Region, Shape, Turns, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_VERBATIM: Final = Verbatim()
# Rows of the same shape (roles, calls, tools, white space) are read once.
_MAX_SHAPES, _MAX_CHARACTERS = 1024, 1 << 16


@dataclass(frozen=True)
class _Layout:
    """Where everything stands in the conversations of one shape."""

    text: str
    parts: list[Part]
    turns: list[int | None]
    """The message whose trained region a part is in."""
    roles: list[str]


class JinjaTemplate:
    """A `Template` around a chat template.

    Raises PluginError when its masks cannot be found, or it prints today's date.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        variables: Mapping[str, Any],
        date: datetime.date | None = None,
        controls: Sequence[str] = (),
        chat_template: str | None = None,
    ) -> None:
        if LETTER.search(source):
            raise PluginError("the chat template holds letters of CJK Extension B, by which texts are told apart here")
        self.chat_template = chat_template
        added = _control_tokens(tokenizer, source, controls)
        self.controls = frozenset(added)
        self._jinja = Jinja(source, {**tokenizer.special_tokens_map, **variables}, date)
        self._turns, self.rewrites_history = probed(Turns(self._jinja, Scanner(added)))
        self.stop = self._turns.stop
        self._layouts: OrderedDict[str, _Layout] = OrderedDict()
        if self._turns.tail:
            log.warning(
                "the chat template asks for an answer with %r, which its own answers leave out; here both are without",
                self._turns.tail,
            )

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Raises DataError where the template refuses the conversation, or whose turn is where cannot be told."""
        return tuple(self._segments(conversation, prompt=False))

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        return tuple(self._segments(conversation, prompt=True))

    def _segments(self, conversation: Conversation, *, prompt: bool) -> Iterator[Segment]:
        shape = self._turns.shape(conversation)
        layout = self._layout(shape, prompt=prompt)
        rendered = self._jinja(data_of(conversation, self._turns.form, _VERBATIM), prompt=prompt)
        if prompt:
            rendered = rendered.removesuffix(self._turns.tail)
        texts = fill(layout.parts, layout.text, shape.letters, rendered)
        for part, text, turn, role in zip(layout.parts, texts, layout.turns, layout.roles, strict=True):
            if part.control:
                text = part.text  # without the white space that the token swallows
            weight = 1.0 if turn is None else conversation.messages[turn].weight
            yield Segment(text, turn is not None, control=part.control, weight=weight, role=role)

    def _layout(self, shape: Shape, *, prompt: bool) -> _Layout:
        trained = [message.trained for message in shape.conversation.messages]
        key = json.dumps([shape.data.messages, shape.data.tools, shape.letters.repeats, trained, prompt])
        if key in self._layouts:
            self._layouts.move_to_end(key)
            return self._layouts[key]
        layout = self._lay_out(shape, prompt=prompt)
        if len(key) <= _MAX_CHARACTERS:
            self._layouts[key] = layout
            if len(self._layouts) > _MAX_SHAPES:
                self._layouts.popitem(last=False)
        return layout

    def _lay_out(self, shape: Shape, *, prompt: bool) -> _Layout:
        regions: list[Region] = []
        if prompt:
            written = self._turns.prompt(shape)
        else:
            written, regions = self._turns.regions(shape)
        parts = cut(written.parts, [place for region in regions for place in (region.start, region.end)])
        turns = [next((r.message for r in regions if r.start <= part.start < r.end), None) for part in parts]
        messages = shape.conversation.messages
        speakers: dict[int | None, str] = {}
        for index, message in enumerate(messages):
            speakers |= dict.fromkeys(shape.said(index, reasoning=True), message.role)
        roles = [
            speakers.get(part.number, "") if turn is None else messages[turn].role
            for part, turn in zip(parts, turns, strict=True)
        ]
        return _Layout(written.text, parts, turns, roles)


def _control_tokens(tokenizer: PreTrainedTokenizerBase, source: str, declared: Sequence[str]) -> dict[str, AddedToken]:
    """The tokenizer's special tokens, its other added tokens that the template spells, and those that it declares."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    found = {text: token for text, token in added.items() if token.special or text in source}
    return {text: AddedToken(text, special=True) for text in declared} | found
