"""Reads JSON values out of a record, and says in words what stands there instead; shared by the parsers."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sftx import DataError, Location, Record

_DEEPEST: Final = 64  # far from where Python's own JSON writer gives up
_MOST_BITS: Final = 4096  # Python refuses to write an int of more than 4300 digits
_SHOWN: Final = 60
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


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}..."
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() <= 64) or isinstance(value, float):
        return repr(value)
    return kind(value)


def text(value: Any, name: str, where: Location) -> str:
    """`value`, which must be text. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind(value)}, expected text")
    return value


def optional_text(record: Record, field: str, where: Location, *, name: str = "") -> str:
    """The text of a field that may be missing or null; then empty. `name`: of the field in errors."""
    value = record.get(field)
    return "" if value is None else text(value, name or field, where)


def list_of(value: Any, name: str, where: Location) -> list[Any]:
    """`value`, which must be a list. Raises DataError."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is {kind(value)}, expected a list")
    return value


def choice(value: Any, name: str, where: Location, known: Mapping[str, str]) -> str:
    """What the word `value` stands for. Raises DataError for one that is not known."""
    if isinstance(value, str) and value in known:
        return known[value]
    is_word = isinstance(value, str) and len(value) <= _SHOWN
    close = difflib.get_close_matches(value.lower(), list(known), n=1) if is_word else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise DataError(f"{where}: {name} is {shown(value)}, expected {', '.join(known)}{hint}")


def present(record: Record, keys: Sequence[str]) -> str:
    """The first of `keys` that the record has, null being the same as missing; the first one when it has none."""
    return next((key for key in keys if record.get(key) is not None), keys[0])


def from_json(value: str, name: str, where: Location) -> Any:
    """What JSON text holds, nulls and all. Raises DataError."""
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {name} is no valid JSON: {error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError):
        raise DataError(f"{where}: {name} is JSON nested too deeply, or has a number of too many digits") from None
    return checked_json(found, name, where)


def checked_json(value: Any, name: str, where: Location, *, drop_null: bool = False, depth: int = 0) -> Any:
    """A copy of `value`, which must be what JSON can say. Raises DataError.

    `drop_null` leaves the keys of objects out that are null: Arrow gives every object of a column all keys of the
    others, and so does parquet.
    """
    if depth > _DEEPEST:
        raise DataError(f"{where}: {name} is nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        strange = next((key for key in value if not isinstance(key, str)), None)
        if strange is not None:
            raise DataError(f"{where}: {name} has the key {shown(strange)}, expected text")
        kept = {key: inner for key, inner in value.items() if not (drop_null and inner is None)}
        return {
            key: checked_json(inner, name, where, drop_null=drop_null, depth=depth + 1) for key, inner in kept.items()
        }
    if isinstance(value, list):
        return [checked_json(inner, name, where, drop_null=drop_null, depth=depth + 1) for inner in value]
    is_number = (isinstance(value, int) and value.bit_length() <= _MOST_BITS) or (
        isinstance(value, float) and math.isfinite(value)
    )
    if not (value is None or isinstance(value, str | bool) or is_number):
        raise DataError(f"{where}: {name} holds {shown(value)}, which JSON cannot say")
    return value
