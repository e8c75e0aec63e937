"""`JinjaTemplate` renders a conversation with a Jinja chat template and returns it as segments."""

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
from sftx_plugins.templates.jinja.parts import Part, Scanner, fill, split_parts
from sftx_plugins.templates.jinja.placeholders import PLACEHOLDER, Verbatim, to_chat_data
from sftx_plugins.templates.jinja.probes import probe
from sftx_plugins.templates.jinja.regions import ChatTemplate, Region, RegionFinder, Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_VERBATIM: Final = Verbatim()
# Layouts are kept: rows with the same roles, calls, tools and white space have the same one.
_MAX_LAYOUTS, _MAX_KEY_LENGTH = 1024, 1 << 16


@dataclass(frozen=True)
class _Layout:
    """The rendering with placeholders that a kind of conversation has, and what each of its parts belongs to."""

    text: str
    parts: list[Part]
    messages: list[int | None]
    """For each part, the message in whose trained region it is."""
    roles: list[str]
    """For each part, the role that the segment names."""


class JinjaTemplate:
    """A `Template` that renders a Jinja chat template.

    Raises PluginError if the template's trained regions cannot be found, or if it prints today's date.
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
        if PLACEHOLDER.search(source):
            raise PluginError("the chat template has letters of CJK Extension B, which are used as placeholders here")
        self.chat_template = chat_template
        added = _control_tokens(tokenizer, source, controls)
        self.controls = frozenset(added)
        self._jinja = ChatTemplate(source, {**tokenizer.special_tokens_map, **variables}, date)
        self._finder, self.rewrites_history = probe(RegionFinder(self._jinja, Scanner(added)))
        self.stop = self._finder.stop
        self._layouts: OrderedDict[str, _Layout] = OrderedDict()
        if self._finder.prompt_suffix:
            log.warning(
                "the generation prompt of the chat template ends in %r, which its own answers leave out; prompts here "
                "leave it out too",
                self._finder.prompt_suffix,
            )

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Return the segments. Raises DataError if the template refuses the conversation or its regions are unclear."""
        return tuple(self._segments(conversation, prompt=False))

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        return tuple(self._segments(conversation, prompt=True))

    def _segments(self, conversation: Conversation, *, prompt: bool) -> Iterator[Segment]:
        skeleton = self._finder.skeleton(conversation)
        layout = self._layout(skeleton, prompt=prompt)
        expected = self._jinja.render(to_chat_data(conversation, self._finder.message_format, _VERBATIM), prompt=prompt)
        if prompt:
            expected = expected.removesuffix(self._finder.prompt_suffix)
        texts = fill(layout.parts, layout.text, skeleton.placeholders, expected)
        for part, text, message, role in zip(layout.parts, texts, layout.messages, layout.roles, strict=True):
            if part.control:
                text = part.text  # without the white space that the token strips
            weight = 1.0 if message is None else conversation.messages[message].weight
            yield Segment(text, message is not None, control=part.control, weight=weight, role=role)

    def _layout(self, skeleton: Skeleton, *, prompt: bool) -> _Layout:
        """Return the layout of this skeleton, which is computed once for all conversations of its kind."""
        data, trained = skeleton.data, [message.trained for message in skeleton.conversation.messages]
        key = json.dumps([data.messages, data.tools, skeleton.placeholders.repeats, trained, prompt])
        if key in self._layouts:
            self._layouts.move_to_end(key)
            return self._layouts[key]
        layout = self._compute_layout(skeleton, prompt=prompt)
        if len(key) <= _MAX_KEY_LENGTH:
            self._layouts[key] = layout
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        return layout

    def _compute_layout(self, skeleton: Skeleton, *, prompt: bool) -> _Layout:
        regions: list[Region] = []
        if prompt:
            rendering = self._finder.generation_prompt(skeleton)
        else:
            rendering, regions = self._finder.trained_regions(skeleton)
        parts = split_parts(rendering.parts, [place for region in regions for place in (region.start, region.end)])
        trained = [next((r.message for r in regions if r.start <= part.start < r.end), None) for part in parts]
        messages = skeleton.conversation.messages
        role_of: dict[int | None, str] = {}
        for index, message in enumerate(messages):
            role_of |= dict.fromkeys(skeleton.texts_of(index, reasoning=True), message.role)
        roles = [
            role_of.get(part.placeholder, "") if index is None else messages[index].role
            for part, index in zip(parts, trained, strict=True)
        ]
        return _Layout(rendering.text, parts, trained, roles)


def _control_tokens(tokenizer: PreTrainedTokenizerBase, source: str, declared: Sequence[str]) -> dict[str, AddedToken]:
    """Return the tokenizer's special tokens, other added tokens that occur in the template, and the declared ones."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    used = {text: token for text, token in added.items() if token.special or text in source}
    return {text: AddedToken(text, special=True) for text in declared} | used
