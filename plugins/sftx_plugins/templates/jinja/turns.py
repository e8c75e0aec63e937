"""Whose turn is where in what a chat template writes, read off what it writes of the turns before.

All of it is found in texts in which a letter stands for each of the conversation's (`_jinja_data`). An answer begins
where messages[:k] with the generation prompt ends, and goes on to the stop token that follows its last letter. Where a
template does not keep that, DataError says so: nothing is guessed.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers.utils.chat_template_utils import _compile_jinja_template

from sftx import Conversation, DataError, PluginError
from sftx_plugins.templates.jinja.data import FIRST_LETTER, LETTER, Data, Form, Letters, data_of, letters_of
from sftx_plugins.templates.jinja.text import Part, Scanner


class Jinja:
    """A chat template in transformers' sandbox, and the values that it gets besides the conversation."""

    def __init__(self, source: str, variables: Mapping[str, Any], date: datetime.date | None) -> None:
        self._source = source
        self._variables = dict(variables)
        self._date = date

    def __call__(self, data: Data, *, prompt: bool) -> str:
        """What it writes. Raises DataError with the template's own words where it refuses, or fails."""
        asked: list[str] = []

        def strftime_now(form: str) -> str:
            asked.append(form)
            return "" if self._date is None else self._date.strftime(form)

        values = {"documents": None, "strftime_now": strftime_now, **self._variables}
        try:
            template = _compile_jinja_template(self._source)
            written: str = template.render(
                **values | {"messages": data.messages, "tools": data.tools, "add_generation_prompt": prompt}
            )
        except Exception as error:  # Jinja runs whatever Python the template asks for
            raise DataError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None
        if asked and self._date is None:
            raise PluginError(
                "the chat template prints today's date, so that the same row would be other tokens tomorrow; give the "
                "day with --set tokenizer.date=YYYY-MM-DD, or in template_kwargs by the name that the template reads, "
                "such as {date_string: 26 Jul 2024}"
            )
        return written


@dataclass(frozen=True)
class Written:
    """What the template wrote of a conversation's letters."""

    text: str
    parts: list[Part]

    def numbers(self, start: int = 0, end: int | None = None) -> set[int]:
        """The conversation's texts that stand between two characters."""
        stop = len(self.text) if end is None else end
        return {part.number for part in self.parts if part.number is not None and start <= part.start < stop}


@dataclass(frozen=True)
class Region:
    """The trained characters of one turn, in the text with letters."""

    start: int
    end: int
    message: int


@dataclass(frozen=True)
class Shape:
    """A conversation in letters."""

    conversation: Conversation
    letters: Letters
    data: Data

    def said(self, index: int, *, reasoning: bool) -> set[int]:
        """The texts of one turn that must not be lost."""
        message = self.data.messages[index]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        return _numbers([message["content"], message.get("reasoning_content") if reasoning else None, calls])


def _numbers(value: Any) -> set[int]:
    return {ord(letter) - FIRST_LETTER for letter in LETTER.findall(json.dumps(value, ensure_ascii=False))}


_USUAL: Final = Form()


@dataclass(frozen=True)
class Turns:
    """Reads the turns of one template."""

    jinja: Jinja
    scanner: Scanner
    form: Form = _USUAL
    stop: tuple[str, ...] = ()
    tail: str = ""
    """What the generation prompt ends with and the template's own answers do not begin with."""

    def shape(self, conversation: Conversation) -> Shape:
        letters = letters_of(conversation, self.form)
        return Shape(conversation, letters, data_of(conversation, self.form, letters))

    def write(self, shape: Shape, end: int | None = None, *, prompt: bool = False) -> Written:
        """messages[:end]"""
        data = shape.data if end is None else shape.data.until(end)
        text = self.jinja(data, prompt=prompt)
        return Written(text, self.scanner.parts(text, shape.letters.repeats))

    def prompt(self, shape: Shape) -> Written:
        """The conversation so far and the opening of an answer."""
        written = self.write(shape, prompt=True)
        self.check_kept(shape, written, trained=False)
        opening = written.text.removesuffix(self.tail) if self.tail else written.text
        return Written(opening, [part for part in cut(written.parts, [len(opening)]) if part.start < len(opening)])

    def regions(self, shape: Shape) -> tuple[Written, list[Region]]:
        """The whole, and what of it is trained. Raises DataError where that cannot be told for sure."""
        whole = self.write(shape)
        self.check_kept(shape, whole)
        # Of an empty answer the end is trained; of another empty turn there is nothing to train.
        trained = [
            index
            for index, message in enumerate(shape.conversation.messages)
            if message.trained and (message.role == "assistant" or shape.said(index, reasoning=True))
        ]
        return whole, [self._region(shape, whole, index) for index in trained]

    def check_kept(self, shape: Shape, written: Written, *, trained: bool = True) -> None:
        """Raises DataError for a text that the template leaves out; the thoughts of earlier turns it may."""
        found = written.numbers()
        for index, message in enumerate(shape.conversation.messages):
            lost = shape.said(index, reasoning=trained and message.trained) - found
            if lost:
                text = shape.letters.texts[min(lost)]
                raise DataError(f"the chat template leaves out {text!r:.60} of the {message.role}'s turn {index + 1}")
        for tool in shape.data.tools or ():
            if _numbers(tool.get("function", tool).get("name") if isinstance(tool, dict) else tool) - found:
                raise DataError("the chat template leaves out the tools of this conversation")

    def _region(self, shape: Shape, whole: Written, index: int) -> Region:
        messages = shape.conversation.messages
        role = messages[index].role
        until = whole if index + 1 == len(messages) else self.write(shape, index + 1)
        start = (self._opening if role == "assistant" else self._content)(shape, whole, index)
        last = max((part.end for part in until.parts if part.number is not None and part.start >= start), default=start)
        end = self._end(until, last, answer=role == "assistant")
        common = common_length(until.text, whole.text)
        if end > common:
            raise DataError(f"the chat template writes turn {index + 1} in another way once others follow")
        while end < common and until.text[end].isspace():
            end += 1
        if lost := shape.said(index, reasoning=True) - whole.numbers(start, end):
            text = shape.letters.texts[min(lost)]
            raise DataError(f"the chat template writes {text!r:.60} outside of turn {index + 1}, whose it is")
        return Region(start, end, index)

    def _opening(self, shape: Shape, whole: Written, index: int) -> int:
        """Where the model is to go on by itself."""
        asked = self.write(shape, index, prompt=True).text
        opening = asked.removesuffix(self.tail) if self.tail else asked
        if not whole.text.startswith(opening):
            at = common_length(opening, whole.text)
            raise DataError(
                f"turn {index + 1} is not asked for as it is written: the generation prompt has "
                f"{LETTER.sub('…', opening[at : at + 40])!r} where the conversation has "
                f"{LETTER.sub('…', whole.text[at : at + 40])!r}; options such as enable_thinking may decide that"
            )
        return _border(whole.parts, len(opening))

    def _content(self, shape: Shape, whole: Written, index: int) -> int:
        """Where the content of a turn stands that is not the assistant's."""
        before = len(self.write(shape, index).text) if index else 0
        said = shape.said(index, reasoning=True)
        start = next((part.start for part in whole.parts if part.number in said and part.start >= before), None)
        if start is None:
            raise DataError(f"where the chat template writes turn {index + 1} cannot be told, so it cannot be trained")
        return start

    def _end(self, until: Written, last: int, *, answer: bool) -> int:
        """After the stop token of an answer, or the first control token after another turn."""
        after = [part for part in until.parts if part.control and part.start >= last]
        end = next((part.end for part in after if not answer or part.text in self.stop), None)
        if end is None and answer:
            raise DataError(f"the chat template ends an answer of this conversation without {' or '.join(self.stop)}")
        return len(until.text) if end is None else end


def _border(parts: Sequence[Part], at: int) -> int:
    """The same place, or after the white space that a control token swallows. Raises DataError within a token."""
    for part in parts:
        if part.start < at < part.end and part.control:
            if at - part.start < len(part.text):
                raise DataError(f"the generation prompt ends within the control token {part.text}")
            return part.end
    return at


def common_length(one: str, other: str) -> int:
    """Characters that both begin with."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 -- of texts, not of paths


def cut(parts: Sequence[Part], places: Iterable[int]) -> list[Part]:
    """The same, with the template's own text cut in two at these places."""
    found = list(parts)
    for place in places:
        for index, part in enumerate(found):
            if part.start < place < part.end and not part.control and part.number is None:
                size = place - part.start
                halves = [Part(part.start, place, part.text[:size]), Part(place, part.end, part.text[size:])]
                found[index : index + 1] = halves
                break
    return found
