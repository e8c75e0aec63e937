"""Reads the messages of a conversation from a record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sftx import Conversation, DataError, Location, Message, Record, ToolCall
from sftx_plugins.parsers import _tools, _values
from sftx_plugins.parsers._thoughts import find_tag, split_reasoning

ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "model": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""The role for each word that OpenAI's format and similar ones use."""
CALL: Final = "function_call"
"""A pseudo-role in tables such as `ROLES`: an assistant's turn whose content is JSON text of its tool calls."""

_JSON: Final = re.compile(r"\s*[{\[]\s*[\"{]")
_MAX_WEIGHT: Final = 1e6
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")
_TRAIN: Final = ("train", "trainable", "training")
_WEIGHT: Final = ("weight", "loss_weight")
_MEDIA: Final = ("image", "images", "video", "videos", "audio", "audios")


def conversation(messages: Sequence[Message], record: Record, where: Location, *, turns: Any = ()) -> Conversation:
    """Return the messages with the record's tools. Raises DataError for images, video or audio, and for KTO labels.

    `turns` is the list that the messages were read from; MiniMind's data has the tools in its first item, the system
    turn.
    """
    if isinstance(record.get("label"), bool):
        raise DataError(
            f"{where}: label marks the answer as good or bad, and an answer is imitated here whatever it says; train "
            "on both kinds with --plugin kto, or remove rows with bad answers, and the field"
        )
    media = next((field for field in _MEDIA if record.get(field)), None)
    if media is not None:
        raise DataError(f"{where}: {media} cannot be trained on, only text; remove such rows")
    tools = _tools.tools(record.get("tools"), "tools", where)
    first = turns[0] if isinstance(turns, list) and turns else {}
    if not tools:
        key = _values.first_key(first, ("tools", "functions"))
        tools = _tools.tools(first.get(key), f"the first turn's {key}", where)
    return Conversation(tuple(messages), tools=tools)


def with_system(system: str, messages: Sequence[Message], where: Location) -> tuple[Message, ...]:
    """Return the messages after the text of a separate system field. Raises DataError if they begin with another."""
    if not system:
        return tuple(messages)
    if messages and messages[0].role == "system":
        if messages[0].content != system:
            raise DataError(f"{where}: system and the first turn have different system texts; keep one of them")
        return tuple(messages)
    return (Message("system", system), *messages)


def answer(text: str, name: str, where: Location) -> Message:
    """Return an assistant's message of a text that may begin with a thought. Raises DataError."""
    reasoning, content = split_reasoning(text, name, where)
    return Message("assistant", content, reasoning=reasoning)


def messages(
    value: Any,
    name: str,
    where: Location,
    *,
    tags: Mapping[str, str] = ROLES,
    role_keys: Sequence[str] = ("role",),
    content_keys: Sequence[str] = ("content",),
) -> tuple[Message, ...]:
    """Return the messages of a list of objects such as `{role, content}`. Raises DataError.

    `tags` maps the words for roles to roles. The first of `role_keys` and of `content_keys` that an object has is read.
    """
    result = []
    role_and_text = {role_keys[0], content_keys[0]}
    for number, turn in enumerate(_values.list_of(value, name, where)):
        at = f"{name}[{number}]"
        # Most turns are a role and a text alone; read this way they take a third of the time.
        if isinstance(turn, dict) and turn.keys() == role_and_text:
            tag, text = turn[role_keys[0]], turn[content_keys[0]]
            if isinstance(tag, str) and isinstance(text, str) and (role := tags.get(tag, CALL)) != CALL:
                result.append(
                    answer(text, f"{at}.{content_keys[0]}", where) if role == "assistant" else Message(role, text)
                )
                continue
        result.append(message(turn, at, where, tags=tags, role_keys=role_keys, content_keys=content_keys))
    return tuple(result)


def message(
    turn: Any,
    at: str,
    where: Location,
    *,
    tags: Mapping[str, str] = ROLES,
    role_keys: Sequence[str] = ("role",),
    content_keys: Sequence[str] = ("content",),
) -> Message:
    """Return one message, which errors call `at`; the rest is as for `messages`. Raises DataError."""
    if not isinstance(turn, dict):
        raise DataError(
            f"{where}: {at} is {_values.kind(turn)}, expected an object with {role_keys[0]} and {content_keys[0]}"
        )
    role_key = _values.first_key(turn, role_keys)
    for keys in (role_keys, content_keys):
        _values.check_spelling(turn, keys, at, where)
    role = _values.lookup(turn.get(role_key), f"{at}.{role_key}", where, tags)
    return _message(turn, role, _values.first_key(turn, content_keys), at, where)


def _message(turn: Record, role: str, content_key: str, at: str, where: Location) -> Message:
    content, reasoning, calls = _content(turn, role, content_key, at, where)
    role = "assistant" if role == CALL else role
    if role != "assistant" and (reasoning or calls):
        kind = "tool calls" if calls else "reasoning"
        raise DataError(f"{where}: {at} is a turn of the {role} and has {kind}; only an assistant's turn can")
    trainable, weight = _trainable_and_weight(turn, at, where)
    name, tool_call_id = (
        (_values.optional_text(turn, field, where, name=f"{at}.{field}") or None) if role == "tool" else None
        for field in ("name", "tool_call_id")
    )
    return Message(
        role,
        content,
        trainable,
        weight,
        reasoning=reasoning,
        tool_calls=calls,
        name=name,
        tool_call_id=tool_call_id,
    )


def _content(turn: Record, role: str, key: str, at: str, where: Location) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Return a turn's content, its reasoning and its tool calls."""
    value, name = turn.get(key), f"{at}.{key}"
    thoughts = {
        f"{at}.{field}": text
        for field in _REASONING
        if (text := _values.optional_text(turn, field, where, name=f"{at}.{field}"))
    }
    calls = [call for field in ("tool_calls", CALL) for call in _tools.calls(turn.get(field), f"{at}.{field}", where)]
    if isinstance(value, list) and role != CALL:
        value, part_reasoning, part_calls = _parts(value, name, where)
        thoughts |= {f"a part of {name}": part_reasoning} if part_reasoning else {}
        calls += part_calls
    for place, text in thoughts.items():
        if (tag := find_tag(text)) is not None:
            raise DataError(f"{where}: {place} has {tag[0]}; leave out the tags, which the template writes")
    if isinstance(value, str) and (role == "assistant" or (role == CALL and not _JSON.match(value))):
        reasoning, answer = split_reasoning(value, name, where)
        if answer != value:
            thoughts[name] = reasoning
            value = answer
    if len({text.strip("\n") for text in thoughts.values()}) > 1:
        raise DataError(
            f"{where}: {' and '.join(thoughts)} have different reasoning (a text up to </think> is reasoning); "
            "keep one of them"
        )
    reasoning = next(iter(thoughts.values()), "")
    if role == CALL:
        calls += _tools.calls(value, name, where)
        if not calls:
            raise DataError(f"{where}: {name} is {_values.shown(value)}, expected JSON text of a call, with its name")
        return "", reasoning, tuple(calls)
    if value is None and (calls or reasoning):
        value = ""
    return _values.text(value, name, where), reasoning, tuple(calls)


def _parts(parts: list[Any], name: str, where: Location) -> tuple[str, str, list[ToolCall]]:
    """Return the text, the reasoning and the tool calls of a content that is a list of parts."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for number, part in enumerate(parts):
        at = f"{name}[{number}]"
        if not isinstance(part, dict):
            raise DataError(f"{where}: {at} is {_values.kind(part)}, expected an object with type and text")
        kind = part.get("type")
        if kind == "text":
            key = _values.first_key(part, ("text", "value"))
            texts.append(_values.text(part.get(key), f"{at}.{key}", where))
        elif kind in ("reasoning", "thinking"):
            key = _values.first_key(part, (kind, "text", "value"))
            reasoning.append(_values.text(part.get(key), f"{at}.{key}", where))
        elif kind == "tool_call":
            key = _values.first_key(part, ("tool_call", "value"))
            calls += _tools.calls(part.get(key), f"{at}.{key}", where)
        else:
            raise DataError(
                f"{where}: {at}.type is {_values.shown(kind)}, expected text, reasoning, thinking or tool_call; "
                "images and audio cannot be trained on"
            )
    return "".join(texts), "\n".join(reasoning), calls


def _trainable_and_weight(turn: Record, at: str, where: Location) -> tuple[bool | None, float]:
    """Return whether a turn is trained, or None if it does not say, and its weight in the loss.

    A weight of 0 leaves a turn untrained. A positive `loss_weight` (LLaMA-Factory) marks it as trained.
    """
    train_key, weight_key = (_values.first_key(turn, keys) for keys in (_TRAIN, _WEIGHT))
    trainable, weight = turn.get(train_key), turn.get(weight_key)
    if not (trainable is None or isinstance(trainable, bool)):
        raise DataError(f"{where}: {at}.{train_key} is {_values.shown(trainable)}, expected true or false")
    if weight is None:
        return trainable, 1.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight <= _MAX_WEIGHT:
        raise DataError(
            f"{where}: {at}.{weight_key} is {_values.shown(weight)}, expected a number from 0 to {_MAX_WEIGHT:g}"
        )
    if trainable and weight == 0:
        raise DataError(f"{where}: {at}.{train_key} is true and {weight_key} is 0; leave one of them out")
    if trainable is None and (weight == 0 or weight_key == "loss_weight"):
        trainable = weight > 0
    return trainable, float(weight) if weight > 0 else 1.0
