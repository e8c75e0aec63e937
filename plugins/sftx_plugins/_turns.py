"""Reads turns of a conversation out of a record's values; shared by the parsers of conversations."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from sftx import DataError, Location, Message, Record

ROLES: Final = ("system", "user", "assistant", "tool")


def text(value: Any, name: str, where: Location) -> str:
    """`value`, which must be text. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_kind(value)}, expected text")
    return value


def optional_text(record: Record, field: str, where: Location) -> str:
    """The text of a field that may be missing or null; then empty."""
    value = record.get(field)
    return "" if value is None else text(value, field, where)


def list_of(value: Any, name: str, where: Location) -> list[Any]:
    """`value`, which must be a list. Raises DataError."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is {_kind(value)}, expected a list")
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
            raise DataError(f"{where}: {at} is {_kind(turn)}, expected an object with role and content")
        turns.append(
            Message(
                role(turn.get("role"), f"{at}.role", where, {r: r for r in ROLES}),
                text(turn.get("content"), f"{at}.content", where),
            )
        )
    return tuple(turns)


def _kind(value: Any) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"
