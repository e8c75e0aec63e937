"""Reads turns of a conversation out of a record's values; shared by the parsers of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sftx import Conversation, DataError, Location, Message, Record, ToolCall
from sftx_plugins.parsers import _tools, _values

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
"""The role of a turn by what OpenAI's form and its relatives call it."""
CALL: Final = "function_call"
"""Stands for a role in tables such as `ROLES`: an assistant's turn whose content is JSON text of its calls."""

_LARGEST_WEIGHT: Final = 1e6
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")
_TRAIN: Final = ("train", "trainable", "training")
_WEIGHT: Final = ("weight", "loss_weight")
_MEDIA: Final = ("image", "images", "video", "videos", "audio", "audios")
_OPEN, _CLOSE = "<think>", "</think>"


def conversation(messages: Sequence[Message], record: Record, where: Location, *, turns: Any = ()) -> Conversation:
    """The messages with the record's tools. Raises DataError for one with pictures or sounds, or a bad answer.

    `turns` is what the messages were read from: MiniMind's data has the tools in the first one, the system's.
    """
    if isinstance(record.get("label"), bool):
        raise DataError(
            f"{where}: label says whether the answer is a good one (KTO), which needs a plugin of its own; leave bad "
            "answers out, and the field"
        )
    media = next((field for field in _MEDIA if record.get(field)), None)
    if media is not None:
        raise DataError(f"{where}: {media} cannot be trained on, only text; leave such rows out")
    tools = _tools.tools(record.get("tools"), "tools", where)
    first = turns[0] if isinstance(turns, list) and turns else {}
    if not tools:
        key = _values.present(first, ("tools", "functions"))
        tools = _tools.tools(first.get(key), f"the first turn's {key}", where)
    return Conversation(tuple(messages), tools=tools)


def with_system(system: str, messages: Sequence[Message], where: Location) -> tuple[Message, ...]:
    """The turns after the system text that stands in a field of its own, if there is any. Raises DataError."""
    if not system:
        return tuple(messages)
    if messages and messages[0].role == "system":
        if messages[0].content != system:
            raise DataError(f"{where}: has a text in system and another one in its first turn; keep one of them")
        return tuple(messages)
    return (Message("system", system), *messages)


def answer(text: str) -> Message:
    """An assistant's turn; a block of reasoning at its beginning is taken for what it is."""
    reasoning, content = split_reasoning(text)
    return Message("assistant", content, reasoning=reasoning)


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning of `<think>reasoning</think>content`, and the content; ("", text) where none stands first.

    A tag in a text never becomes a control token later, so the reasoning has to be told from the content here. Of both,
    those newlines are taken off that the templates of Qwen3 and DeepSeek-R1 write around them, and nothing else.
    """
    begun = text.lstrip()
    if not begun.startswith(_OPEN) or _CLOSE not in begun:
        return "", text
    reasoning, _, content = begun.removeprefix(_OPEN).partition(_CLOSE)
    return reasoning.strip("\n"), content.lstrip("\n")


def messages(
    value: Any,
    name: str,
    where: Location,
    *,
    tags: Mapping[str, str] = ROLES,
    role_keys: Sequence[str] = ("role",),
    content_keys: Sequence[str] = ("content",),
) -> tuple[Message, ...]:
    """The turns of a list of objects such as `{role, content}`. Raises DataError.

    `tags` are the words for roles; of `role_keys` and `content_keys` the first is taken that a turn has.
    """
    found = []
    for number, turn in enumerate(_values.list_of(value, name, where)):
        at = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise DataError(
                f"{where}: {at} is {_values.kind(turn)}, expected an object with {role_keys[0]} and {content_keys[0]}"
            )
        role_key = _values.present(turn, role_keys)
        role = _values.choice(turn.get(role_key), f"{at}.{role_key}", where, tags)
        found.append(_message(turn, role, _values.present(turn, content_keys), at, where))
    return tuple(found)


def _message(turn: Record, role: str, content_key: str, at: str, where: Location) -> Message:
    content, reasoning, calls = _said(turn, role, content_key, at, where)
    role = "assistant" if role == CALL else role
    if role != "assistant" and (reasoning or calls):
        what = "tool calls" if calls else "reasoning"
        raise DataError(f"{where}: {at} is a turn of the {role} and has {what}; only an assistant's turn can")
    trainable, weight = _training(turn, at, where)
    is_result = role == "tool"
    return Message(
        role,
        content,
        trainable,
        weight,
        reasoning=reasoning,
        tool_calls=calls,
        name=_known_by(turn, "name", at, where) if is_result else None,
        tool_call_id=_known_by(turn, "tool_call_id", at, where) if is_result else None,
    )


def _said(turn: Record, role: str, key: str, at: str, where: Location) -> tuple[str, str, tuple[ToolCall, ...]]:
    """A turn's content, its reasoning and its calls."""
    value, name = turn.get(key), f"{at}.{key}"
    reasoning_key = _values.present(turn, _REASONING)
    reasoning = _values.optional_text(turn, reasoning_key, where, name=f"{at}.{reasoning_key}")
    calls = [call for field in ("tool_calls", CALL) for call in _tools.calls(turn.get(field), f"{at}.{field}", where)]
    if isinstance(value, list) and role != CALL:
        value, part_reasoning, part_calls = _parts(value, name, where)
        reasoning, calls = reasoning or part_reasoning, calls + part_calls
    if value is None and (calls or reasoning):
        value = ""
    if role == CALL:
        if isinstance(value, str) and not reasoning:
            reasoning, value = split_reasoning(value)
        calls += _tools.calls(value, name, where)
        if not calls:
            raise DataError(f"{where}: {name} is {_values.shown(value)}, expected JSON text of a call, with its name")
        return "", reasoning, tuple(calls)
    content = _values.text(value, name, where)
    if role == "assistant" and not reasoning:
        reasoning, content = split_reasoning(content)
    return content, reasoning, tuple(calls)


def _parts(parts: list[Any], name: str, where: Location) -> tuple[str, str, list[ToolCall]]:
    """What a content in parts says: text, reasoning and calls, each put together."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for number, part in enumerate(parts):
        at = f"{name}[{number}]"
        if not isinstance(part, dict):
            raise DataError(f"{where}: {at} is {_values.kind(part)}, expected an object with type and text")
        kind = part.get("type")
        if kind == "text":
            key = _values.present(part, ("text", "value"))
            texts.append(_values.text(part.get(key), f"{at}.{key}", where))
        elif kind in ("reasoning", "thinking"):
            key = _values.present(part, (kind, "text", "value"))
            reasoning.append(_values.text(part.get(key), f"{at}.{key}", where))
        elif kind == "tool_call":
            key = _values.present(part, ("tool_call", "value"))
            calls += _tools.calls(part.get(key), f"{at}.{key}", where)
        else:
            raise DataError(
                f"{where}: {at}.type is {_values.shown(kind)}, expected text, reasoning, thinking or tool_call; "
                "pictures and sounds cannot be trained on"
            )
    return "".join(texts), "\n".join(reasoning), calls


def _training(turn: Record, at: str, where: Location) -> tuple[bool | None, float]:
    """Whether a turn is trained, None where it does not say, and its weight in the loss.

    OpenAI's `weight` 0 trains nothing of a turn. LLaMA-Factory's `loss_weight` also says that a turn is trained.
    """
    train_key, weight_key = (_values.present(turn, keys) for keys in (_TRAIN, _WEIGHT))
    trainable, weight = turn.get(train_key), turn.get(weight_key)
    if not (trainable is None or isinstance(trainable, bool)):
        raise DataError(f"{where}: {at}.{train_key} is {_values.shown(trainable)}, expected true or false")
    if weight is None:
        return trainable, 1.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight <= _LARGEST_WEIGHT:
        raise DataError(
            f"{where}: {at}.{weight_key} is {_values.shown(weight)}, expected a number from 0 to {_LARGEST_WEIGHT:g}"
        )
    if trainable and weight == 0:
        raise DataError(f"{where}: {at}.{train_key} is true and {weight_key} is 0; leave one of them out")
    if trainable is None and (weight == 0 or weight_key == "loss_weight"):
        trainable = weight > 0
    return trainable, float(weight) if weight > 0 else 1.0


def _known_by(turn: Record, field: str, at: str, where: Location) -> str | None:
    return _values.optional_text(turn, field, where, name=f"{at}.{field}") or None
