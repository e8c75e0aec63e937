"""Reads turns of a conversation out of a record's values; shared by the parsers of conversations."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from sftx import DataError, Location, Message, Record

_LARGEST_WEIGHT: Final = 1e6
ROLES: Final = ("system", "user", "assistant", "tool")


def text(value: Any, name: str, where: Location) -> str:
    """`value`, which must be text. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind(value)}, expected text")
    return value


def optional_text(record: Record, field: str, where: Location) -> str:
    """The text of a field that may be missing or null; then empty."""
    value = record.get(field)
    return "" if value is None else text(value, field, where)


def list_of(value: Any, name: str, where: Location) -> list[Any]:
    """`value`, which must be a list. Raises DataError."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is {kind(value)}, expected a list")
    return value


def role(value: Any, name: str, where: Location, known: Mapping[str, str]) -> str:
    """The role that `value` names in this format. Raises DataError for one that it does not know."""
    if isinstance(value, str) and value in known:
        return known[value]
    close = difflib.get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(f"{where}: {name} is {value!r}, expected {', '.join(known)}{hint}")


def messages(value: Any, name: str, where: Location) -> tuple[Message, ...]:
    """Messages in the form `{role, content}` of OpenAI and TRL. Raises DataError."""
    turns = []
    for number, turn in enumerate(list_of(value, name, where)):
        at = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{where}: {at} is {kind(turn)}, expected an object with role and content")
        if turn.get("tool_calls"):
            raise DataError(f"{where}: {at}.tool_calls cannot be trained on yet; write the call as the content")
        speaker = role(turn.get("role"), f"{at}.role", where, {r: r for r in ROLES})
        content = text(turn.get("content"), f"{at}.content", where)
        weight = _weight(turn.get("weight"), f"{at}.weight", where)
        turns.append(Message(speaker, content, trainable=False if weight == 0 else None, weight=weight or 1.0))
    return tuple(turns)


def _weight(value: Any, name: str, where: Location) -> float:
    """OpenAI's weight of a message in the loss: 0 trains nothing of it; 1 when it is missing."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST_WEIGHT:
        raise DataError(f"{where}: {name} is {value!r}, expected a number from 0 to {_LARGEST_WEIGHT:g}")
    return float(value)


_KINDS: Final[dict[type, str]] = {
    type(None): "missing or null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), type(value).__name__)
