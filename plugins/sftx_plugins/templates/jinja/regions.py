"""The trained characters of each turn, found by rendering the turns before it.

All renderings here hold placeholders. An answer begins where the rendering of messages[:k] with the generation prompt
ends, and goes on to the stop token after its last placeholder. DataError is raised if the template does not keep to
that; nothing is guessed.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers.utils.chat_template_utils import _compile_jinja_template

from sftx import Conversation, DataError, PluginError
from sftx_plugins.templates.jinja.parts import Part, Scanner, split_parts
from sftx_plugins.templates.jinja.placeholders import (
    PLACEHOLDER,
    ChatData,
    MessageFormat,
    Placeholders,
    placeholders_in,
    with_placeholders,
)


class ChatTemplate:
    """A Jinja chat template in transformers' sandbox, with the variables that it gets besides the conversation."""

    def __init__(self, source: str, variables: Mapping[str, Any], date: datetime.date | None) -> None:
        self._source = source
        self._variables = dict(variables)
        self._date = date

    def render(self, data: ChatData, *, prompt: bool) -> str:
        """Return what the template writes; `prompt` adds the generation prompt.

        Raises DataError with the template's own words if it fails, and PluginError if it asks for today's date.
        """
        formats: list[str] = []

        def strftime_now(format_: str) -> str:
            formats.append(format_)
            return "" if self._date is None else self._date.strftime(format_)

        variables = {"documents": None, "strftime_now": strftime_now, **self._variables}
        try:
            template = _compile_jinja_template(self._source)
            text: str = template.render(
                **variables | {"messages": data.messages, "tools": data.tools, "add_generation_prompt": prompt}
            )
        except Exception as error:  # Jinja runs whatever Python the template asks for
            raise DataError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None
        if formats and self._date is None:
            raise PluginError(
                "the chat template prints today's date, so the same row would have other tokens tomorrow; set the day "
                "with --set tokenizer.date=YYYY-MM-DD, or in template_kwargs by the name that the template reads, "
                "such as {date_string: 26 Jul 2024}"
            )
        return text


@dataclass(frozen=True)
class Skeleton:
    """A conversation and its data with placeholders."""

    conversation: Conversation
    data: ChatData
    placeholders: Placeholders

    def texts_of(self, index: int, *, reasoning: bool) -> set[int]:
        """Return the placeholders of the texts of one message that must not be lost."""
        message = self.data.messages[index]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        return placeholders_in([message["content"], message.get("reasoning_content") if reasoning else None, calls])


@dataclass(frozen=True)
class Rendering:
    """The text that the template renders for a skeleton."""

    text: str
    parts: list[Part]


@dataclass(frozen=True)
class Region:
    """The trained characters of one message, in the rendering with placeholders."""

    start: int
    end: int
    message: int


_USUAL: Final = MessageFormat()
_ADVICE_TOOLS: Final = "write them into the turns, or choose another template, such as --plugin chatml"


@dataclass(frozen=True)
class RegionFinder:
    """Finds the trained regions of conversations for one chat template. `probes.probe` sets the last three fields."""

    chat_template: ChatTemplate
    scanner: Scanner
    message_format: MessageFormat = _USUAL
    stop: tuple[str, ...] = ()
    prompt_suffix: str = ""
    """The end of the generation prompt that the template's own answers do not begin with, such as `<think>`."""

    def skeleton(self, conversation: Conversation) -> Skeleton:
        return Skeleton(conversation, *with_placeholders(conversation, self.message_format))

    def render(self, skeleton: Skeleton, end: int | None = None, *, prompt: bool = False) -> Rendering:
        """Return the rendering of messages[:end]."""
        data = ChatData(skeleton.data.messages[:end], skeleton.data.tools)
        text = self.chat_template.render(data, prompt=prompt)
        return Rendering(text, self.scanner.parts(text, skeleton.placeholders.repeats))

    def generation_prompt(self, skeleton: Skeleton) -> Rendering:
        """Return the conversation with the generation prompt, up to `prompt_suffix`."""
        rendering = self.render(skeleton, prompt=True)
        self.check_nothing_lost(skeleton, rendering, trained=False)
        text = rendering.text.removesuffix(self.prompt_suffix)
        return Rendering(text, [part for part in split_parts(rendering.parts, [len(text)]) if part.start < len(text)])

    def trained_regions(self, skeleton: Skeleton) -> tuple[Rendering, list[Region]]:
        """Return the rendering and its trained regions. Raises DataError unless these are certain."""
        rendering = self.render(skeleton)
        self.check_nothing_lost(skeleton, rendering)
        # The end of an empty answer is trained; another turn without text has nothing to train.
        trained = [
            index
            for index, message in enumerate(skeleton.conversation.messages)
            if message.trained and (message.role == "assistant" or skeleton.texts_of(index, reasoning=True))
        ]
        return rendering, [self._region(skeleton, rendering, index) for index in trained]

    def check_nothing_lost(self, skeleton: Skeleton, rendering: Rendering, *, trained: bool = True) -> None:
        """Raise DataError if the template leaves out a text. It may leave out the reasoning of untrained turns."""
        written = {part.placeholder for part in rendering.parts}
        for tool in skeleton.data.tools or ():
            if placeholders_in(tool.get("function", tool).get("name") if isinstance(tool, dict) else tool) - written:
                raise DataError(f"the chat template leaves out the tools; {_ADVICE_TOOLS}")
        for index, message in enumerate(skeleton.conversation.messages):
            calls = [call["function"]["name"] for call in skeleton.data.messages[index].get("tool_calls", ())]
            if placeholders_in(calls) - written:
                raise DataError(f"the chat template leaves out the tool calls; {_ADVICE_TOOLS}")
            lost = skeleton.texts_of(index, reasoning=trained and message.trained) - written
            if lost:
                text = skeleton.placeholders.texts[min(lost)]
                raise DataError(f"the chat template leaves out {text!r:.60} of the {message.role}'s turn {index + 1}")

    def _region(self, skeleton: Skeleton, rendering: Rendering, index: int) -> Region:
        messages = skeleton.conversation.messages
        is_answer = messages[index].role == "assistant"
        texts = skeleton.texts_of(index, reasoning=True)
        until = rendering if index + 1 == len(messages) else self.render(skeleton, index + 1)
        if is_answer:
            start = self._answer_start(skeleton, rendering, index)
        else:
            start = self._content_start(skeleton, rendering, index, texts)
        written = [part for part in until.parts if part.placeholder is not None and part.start >= start]
        last = max((part.end for part in written), default=start)
        # An answer goes on to its stop token, another turn to the control token after its text.
        after = [part for part in until.parts if part.control and part.start >= last]
        end = next((part.end for part in after if not is_answer or part.text in self.stop), None)
        if end is None and is_answer:
            raise DataError(f"the chat template ends an answer of this conversation without {' or '.join(self.stop)}")
        end = len(until.text) if end is None else end
        common = common_prefix_length(until.text, rendering.text)
        if end > common:
            raise DataError(f"the chat template renders turn {index + 1} differently once other turns follow")
        while end < common and until.text[end].isspace():
            end += 1
        if lost := texts - {part.placeholder for part in rendering.parts if start <= part.start < end}:
            text = skeleton.placeholders.texts[min(lost)]
            raise DataError(f"the chat template writes {text!r:.60} of turn {index + 1} outside of that turn")
        return Region(start, end, index)

    def _answer_start(self, skeleton: Skeleton, rendering: Rendering, index: int) -> int:
        """Return the character at which the generation prompt for this answer ends."""
        prompt = self.render(skeleton, index, prompt=True).text.removesuffix(self.prompt_suffix)
        if not rendering.text.startswith(prompt):
            at = common_prefix_length(prompt, rendering.text)
            raise DataError(
                f"the generation prompt of turn {index + 1} is not how the turn begins: it has "
                f"{PLACEHOLDER.sub('…', prompt[at : at + 40])!r} where the conversation has "
                f"{PLACEHOLDER.sub('…', rendering.text[at : at + 40])!r}; options such as enable_thinking may cause it"
            )
        start = len(prompt)
        for part in rendering.parts:
            if part.start < start < part.end and part.control:
                if start - part.start < len(part.text):
                    raise DataError(f"the generation prompt ends inside the control token {part.text}")
                return part.end  # after the white space that the token strips
        return start

    def _content_start(self, skeleton: Skeleton, rendering: Rendering, index: int, texts: set[int]) -> int:
        """Return the character at which the text of a turn begins that is not the assistant's."""
        before = len(self.render(skeleton, index).text) if index else 0
        start = next((p.start for p in rendering.parts if p.placeholder in texts and p.start >= before), None)
        if start is None:
            raise DataError(f"where the chat template writes turn {index + 1} is not certain, so it cannot be trained")
        return start


def common_prefix_length(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071 -- of texts, not of paths
