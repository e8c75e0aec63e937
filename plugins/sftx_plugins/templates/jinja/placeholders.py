"""Conversations as the plain data that chat templates read: with the row's own texts, or with placeholders for them.

A chat template that gets placeholders shows its own markup and where it writes which text of the conversation. One
rendering holds either placeholders or the row's texts, never both, so a row's text cannot be taken for a placeholder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from sftx import Conversation, DataError, Message, ToolCall

FIRST_PLACEHOLDER: Final = 0x20000
"""Placeholders are letters of CJK Extension B, printable and without case: strip, lower, repr and JSON keep them."""
NUM_PLACEHOLDERS: Final = 0x2A6DE - FIRST_PLACEHOLDER
PLACEHOLDER: Final = re.compile(f"[{chr(FIRST_PLACEHOLDER)}-{chr(FIRST_PLACEHOLDER + NUM_PLACEHOLDERS - 1)}]")

_ROLE = re.compile(r"[A-Za-z][A-Za-z_-]*")
_NAMESPACES: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keywords of JSON Schema whose object has names chosen by the user as keys."""
_KEYWORDS: Final = _NAMESPACES | {
    *("type", "function", "name", "description", "parameters", "required", "items", "enum", "default", "format"),
    *("title", "anyOf", "oneOf", "allOf", "not", "const", "examples", "nullable", "additionalProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "pattern", "prefixItems"),
    *("minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "strict", "return", "returns", "$ref"),
}
_TYPES: Final = frozenset({"string", "number", "integer", "boolean", "object", "array", "null", "function"})


class Substitution(Protocol):
    """Says what the data holds in place of each text, key and identifier of the conversation."""

    def text(self, text: str) -> str: ...
    def key(self, name: str) -> str: ...
    def identifier(self, identifier: str) -> str: ...


class Verbatim:
    """Leaves every text as it is."""

    def text(self, text: str) -> str:
        return text

    key = identifier = text


class _KeyCollector(Verbatim):
    """Leaves every text as it is and collects the keys of objects."""

    def __init__(self) -> None:
        self.keys: dict[str, None] = {}

    def key(self, name: str) -> str:
        self.keys[name] = None
        return name


@dataclass
class Placeholders:
    """Puts one character in place of each text, the same character for equal texts; white space around it stays."""

    texts: list[str] = field(default_factory=list)
    """The text of each placeholder, without white space at its ends."""
    repeats: list[int] = field(default_factory=list)
    """How many times the character is written. An identifier keeps its length, which some templates check."""
    _numbers: dict[tuple[str, int], int] = field(default_factory=dict)

    def text(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return f"{text[:start]}{self._placeholder(core, 1)}{text[start + len(core) :]}"

    key = text

    def identifier(self, identifier: str) -> str:
        return self._placeholder(identifier, len(identifier)) * len(identifier) if identifier else identifier

    def _placeholder(self, text: str, repeat: int) -> str:
        number = self._numbers.setdefault((text, repeat), len(self.texts))
        if number == len(self.texts):
            if number == NUM_PLACEHOLDERS:
                raise DataError(f"the conversation has more than {NUM_PLACEHOLDERS} different texts")
            self.texts.append(text)
            self.repeats.append(repeat)
        return chr(FIRST_PLACEHOLDER + number)


def placeholders_in(value: Any) -> set[int]:
    """Return the numbers of the placeholders in a JSON value."""
    return {ord(found) - FIRST_PLACEHOLDER for found in PLACEHOLDER.findall(json.dumps(value, ensure_ascii=False))}


@dataclass(frozen=True)
class MessageFormat:
    """The ways in which templates differ in the data they expect. `probes` finds them by trying."""

    arguments_as_text: bool = False
    """The arguments of a tool call are JSON text, not an object."""
    null_content: bool = False
    """The content of a turn with tool calls alone is null, not empty."""
    content_as_parts: bool = False
    """A content is a list of parts, such as `[{"type": "text", "text": ...}]`."""


@dataclass(frozen=True)
class ChatData:
    """The arguments `messages` and `tools` of a chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


def to_chat_data(conversation: Conversation, message_format: MessageFormat, substitution: Substitution) -> ChatData:
    """Return the conversation's messages and tools in OpenAI's format.

    Raises DataError for a role that is not a word, and for tools or arguments that are not JSON.
    """
    try:
        messages = [_message(message, message_format, substitution) for message in conversation.messages]
        return ChatData(messages, [_tool_schema(tool, substitution) for tool in conversation.tools] or None)
    except RecursionError:
        raise DataError("tools or arguments are nested too deeply") from None


def with_placeholders(conversation: Conversation, message_format: MessageFormat) -> tuple[ChatData, Placeholders]:
    """Return the conversation's data with placeholders, which sort as the keys that they replace.

    Some templates sort keys.
    """
    placeholders = Placeholders()
    if conversation.tools or any(message.tool_calls for message in conversation.messages):
        collector = _KeyCollector()
        to_chat_data(conversation, message_format, collector)
        for name in sorted(collector.keys, key=str.lower):
            placeholders.key(name)
    return to_chat_data(conversation, message_format, placeholders), placeholders


def _message(message: Message, message_format: MessageFormat, substitution: Substitution) -> dict[str, Any]:
    if not _ROLE.fullmatch(message.role):
        raise DataError(f"the role {message.role!r:.60} is not a word")
    content: Any = substitution.text(message.content)
    if message.tool_calls and not message.content and message_format.null_content:
        content = None
    elif message_format.content_as_parts:
        content = [{"type": "text", "text": content}]
    data: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning:
        # Templates read one name or the other; transformers gives both.
        data["reasoning_content"] = data["thinking"] = substitution.text(message.reasoning)
    if message.tool_calls:
        data["tool_calls"] = [_tool_call(call, message_format, substitution) for call in message.tool_calls]
    if message.name is not None:
        data["name"] = substitution.text(message.name)
    if message.tool_call_id is not None:
        data["tool_call_id"] = substitution.identifier(message.tool_call_id)
    return data


def _tool_call(call: ToolCall, message_format: MessageFormat, substitution: Substitution) -> dict[str, Any]:
    if message_format.arguments_as_text:
        arguments: Any = substitution.text(json.dumps(_json_value(call.arguments, Verbatim()), ensure_ascii=False))
    else:
        arguments = _json_value(call.arguments, substitution)
    data = {"type": "function", "function": {"name": substitution.text(call.name), "arguments": arguments}}
    return data if call.id is None else {"id": substitution.identifier(call.id), **data}


def _json_value(value: Any, substitution: Substitution) -> Any:
    """Return a JSON value with all its keys and texts substituted."""
    if isinstance(value, str):
        return substitution.text(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {substitution.key(key): _json_value(item, substitution) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, substitution) for item in value]
    raise DataError(f"tools or arguments hold {value!r:.60}, which is not a JSON value")


def _tool_schema(value: Any, substitution: Substitution) -> Any:
    """Return a JSON Schema with names and texts substituted. Keywords stay, because templates look for them."""
    if isinstance(value, list | tuple):
        return [_tool_schema(item, substitution) for item in value]
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return _json_value(value, substitution)
    schema: dict[str, Any] = {}
    for key, item in value.items():
        if key in _NAMESPACES and isinstance(item, Mapping) and all(isinstance(name, str) for name in item):
            schema[key] = {substitution.key(name): _tool_schema(inner, substitution) for name, inner in item.items()}
        elif key == "type" and _is_type(item):
            schema[key] = item
        else:
            schema[key if key in _KEYWORDS else substitution.key(key)] = _tool_schema(item, substitution)
    return schema


def _is_type(value: Any) -> bool:
    types = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(type_, str) and type_ in _TYPES for type_ in types)
