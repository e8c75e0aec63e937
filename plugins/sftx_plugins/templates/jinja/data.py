"""A conversation as the plain data that chat templates read: as it is, or with a letter in place of every text.

A template that is given letters shows its own text, and where it puts which of the conversation's. The letters are
never mixed with what a user wrote, so nothing that a user writes can be taken for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from sftx import Conversation, DataError, Message

FIRST_LETTER: Final = 0x20000
"""Of CJK Extension B: printable and without case, so that strip, lower, repr and JSON leave each as it is."""
NUM_LETTERS: Final = 0x2A6DE - FIRST_LETTER
LETTER: Final = re.compile(f"[{chr(FIRST_LETTER)}-{chr(FIRST_LETTER + NUM_LETTERS - 1)}]")

_ROLE = re.compile(r"[A-Za-z][A-Za-z_-]*")
_NAMES: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Words of JSON Schema under which the keys are names that somebody gave."""
_WORDS: Final = _NAMES | {
    *("type", "function", "name", "description", "parameters", "required", "items", "enum", "default", "format"),
    *("title", "anyOf", "oneOf", "allOf", "not", "const", "examples", "nullable", "additionalProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern", "prefixItems"),
    *("minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "strict", "return", "returns", "$ref"),
}
_TYPES: Final = frozenset({"string", "number", "integer", "boolean", "object", "array", "null", "function"})


class Writer(Protocol):
    """What stands in the data for a text of the conversation."""

    def text(self, text: str) -> str: ...
    def key(self, name: str) -> str: ...
    def ident(self, ident: str) -> str: ...


class Verbatim:
    """Every text as it is."""

    def text(self, text: str) -> str:
        return text

    key = ident = text


class _Keys(Verbatim):
    """Notes the keys of objects."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    def key(self, name: str) -> str:
        self.found[name] = None
        return name


@dataclass
class Letters:
    """One letter for each text, the same for the same text, between the white space around it."""

    texts: list[str] = field(default_factory=list)
    """Without white space at their ends, in the order of their letters."""
    repeats: list[int] = field(default_factory=list)
    """How often the letter stands for one occurrence: an identifier keeps its length, which templates check."""
    _numbers: dict[tuple[str, int], int] = field(default_factory=dict)

    def text(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return f"{text[:start]}{self.letter(core)}{text[start + len(core) :]}"

    key = text

    def ident(self, ident: str) -> str:
        return self.letter(ident, len(ident)) * len(ident) if ident else ident

    def number(self, text: str) -> int | None:
        """Of a text that has a letter already; None for white space."""
        return self._numbers.get((text.strip(), 1))

    def letter(self, core: str, repeat: int = 1) -> str:
        number = self._numbers.setdefault((core, repeat), len(self.texts))
        if number == len(self.texts):
            if number == NUM_LETTERS:
                raise DataError(f"the conversation has more than {NUM_LETTERS} different texts")
            self.texts.append(core)
            self.repeats.append(repeat)
        return chr(FIRST_LETTER + number)


@dataclass(frozen=True)
class Form:
    """How a template wants what is written in different ways; found by trying."""

    arguments_as_text: bool = False
    """The arguments of a call are JSON text, not an object."""
    null_content: bool = False
    """The content of a turn that only calls is null, not empty."""
    content_as_parts: bool = False
    """A content is a list of parts, such as `[{"type": "text", "text": ...}]`."""


@dataclass(frozen=True)
class Data:
    """What a template gets."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None

    def until(self, end: int) -> Data:
        return Data(self.messages[:end], self.tools)


def data_of(conversation: Conversation, form: Form, write: Writer) -> Data:
    """The conversation's messages and tools in OpenAI's form. Raises DataError: no JSON, no role."""
    try:
        messages = [_message(message, form, write) for message in conversation.messages]
        return Data(messages, [_schema(tool, write) for tool in conversation.tools] or None)
    except RecursionError:
        raise DataError("tools or arguments are nested too deeply") from None


def letters_of(conversation: Conversation, form: Form) -> Letters:
    """Letters whose order is that of the keys that they stand for: some templates sort them."""
    letters = Letters()
    if conversation.tools or any(message.tool_calls for message in conversation.messages):
        keys = _Keys()
        data_of(conversation, form, keys)
        for name in sorted(keys.found, key=str.lower):
            letters.key(name)
    return letters


def _message(message: Message, form: Form, write: Writer) -> dict[str, Any]:
    if not _ROLE.fullmatch(message.role):
        raise DataError(f"the role {message.role!r:.60} is no word")
    content: Any = write.text(message.content)
    if message.tool_calls and not message.content and form.null_content:
        content = None
    elif form.content_as_parts:
        content = [{"type": "text", "text": content}]
    made: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning:
        # Under both names that templates know, as transformers gives it.
        made["reasoning_content"] = made["thinking"] = write.text(message.reasoning)
    if message.tool_calls:
        made["tool_calls"] = [_call(call, form, write) for call in message.tool_calls]
    if message.name is not None:
        made["name"] = write.text(message.name)
    if message.tool_call_id is not None:
        made["tool_call_id"] = write.ident(message.tool_call_id)
    return made


def _call(call: Any, form: Form, write: Writer) -> dict[str, Any]:
    if form.arguments_as_text:
        arguments: Any = write.text(json.dumps(_values(call.arguments, Verbatim()), ensure_ascii=False))
    else:
        arguments = _values(call.arguments, write)
    made = {"type": "function", "function": {"name": write.text(call.name), "arguments": arguments}}
    return made if call.id is None else {"id": write.ident(call.id), **made}


def _values(value: Any, write: Writer) -> Any:
    """A JSON value whose keys and texts are all the user's."""
    if isinstance(value, str):
        return write.text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {write.key(key): _values(item, write) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_values(item, write) for item in value]
    raise DataError(f"tools or arguments hold {value!r:.60}, which is no JSON value")


def _schema(value: Any, write: Writer) -> Any:
    """A JSON Schema: its own words stay, since templates look for them; names and texts are the user's."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return [_schema(item, write) for item in value] if isinstance(value, list | tuple) else _values(value, write)
    made: dict[str, Any] = {}
    for key, item in value.items():
        if key in _NAMES and isinstance(item, Mapping) and all(isinstance(name, str) for name in item):
            made[key] = {write.key(name): _schema(one, write) for name, one in item.items()}
        elif key == "type" and (item in _TYPES if isinstance(item, str) else _are_types(item)):
            made[key] = item
        else:
            made[key if key in _WORDS else write.key(key)] = _schema(item, write)
    return made


def _are_types(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) and item in _TYPES for item in value)
