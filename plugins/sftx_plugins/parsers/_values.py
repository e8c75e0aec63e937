"""Checks the JSON values of a record. Errors name the place, the value that is there, and the expected one."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sftx import DataError, Location, Record

_MAX_DEPTH: Final = 64  # far below the depth at which Python's own JSON writer fails
_MAX_BITS: Final = 4096  # Python refuses to write an int of more than 4300 digits
_MAX_SHOWN: Final = 60
_SIMILAR: Final = 0.75  # difflib's ratio from which a key is taken for a misspelt one
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
    """Return the kind of a JSON value in words."""
    return _KINDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Return a value as an error message shows it: short, whatever it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]!r}..."
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() <= 64) or isinstance(value, float):
        return repr(value)
    return kind(value)


def text(value: Any, name: str, where: Location) -> str:
    """Return `value`. Raises DataError if it is not text."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind(value)}, expected text")
    return value


def optional_text(record: Record, field: str, where: Location, *, name: str = "") -> str:
    """Return the text of a field, or "" if it is missing or null. Error messages call the field `name`."""
    value = record.get(field)
    return "" if value is None else text(value, name or field, where)


def list_of(value: Any, name: str, where: Location) -> list[Any]:
    """Return `value`. Raises DataError if it is not a list."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is {kind(value)}, expected a list")
    return value


def lookup(value: Any, name: str, where: Location, known: Mapping[str, str]) -> str:
    """Return `known[value]`. Raises DataError with a similar word, or else with all known ones, if there is none."""
    if isinstance(value, str) and value in known:
        return known[value]
    is_word = isinstance(value, str) and len(value) <= _MAX_SHOWN
    close = difflib.get_close_matches(value.lower(), list(known), n=1) if is_word else []
    hint = f"; did you mean {close[0]!r}?" if close else f", expected {', '.join(known)}"
    raise DataError(f"{where}: {name} is {shown(value)}{hint}")


def check_spelling(record: Record, keys: Sequence[str], name: str, where: Location) -> None:
    """Raise DataError if the record has none of `keys`, but one that is similar."""
    if not any(key in record for key in keys):
        for key in keys:
            if close := difflib.get_close_matches(key, [str(other) for other in record], n=1, cutoff=_SIMILAR):
                raise DataError(f"{where}: {name} has {close[0]!r:.80}; did you mean {key!r}?")


def first_key(record: Record, keys: Sequence[str]) -> str:
    """Return the first of `keys` whose value is neither missing nor null; `keys[0]` if there is none."""
    return next((key for key in keys if record.get(key) is not None), keys[0])


def from_json(json_text: str, name: str, where: Location) -> Any:
    """Return the value of a JSON text, including nulls. Raises DataError."""
    try:
        value = json.loads(json_text)
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" at")  # Python says "Invalid control character at"
        raise DataError(f"{where}: {name} is not valid JSON: {said} at character {error.pos + 1}") from None
    except (RecursionError, ValueError):
        raise DataError(f"{where}: {name} is JSON nested too deeply, or has a number of too many digits") from None
    return checked_json(value, name, where)


def checked_json(value: Any, name: str, where: Location, *, depth: int = 0) -> Any:
    """Return a copy of `value`, with its nulls. Raises DataError if it is not a JSON value."""
    if depth > _MAX_DEPTH:
        raise DataError(f"{where}: {name} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise DataError(f"{where}: {name} has the key {shown(wrong)}, expected text")
        return {key: checked_json(inner, name, where, depth=depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [checked_json(inner, name, where, depth=depth + 1) for inner in value]
    is_number = (isinstance(value, int) and value.bit_length() <= _MAX_BITS) or (
        isinstance(value, float) and math.isfinite(value)
    )
    if not (value is None or isinstance(value, str | bool) or is_number):
        raise DataError(f"{where}: {name} holds {shown(value)}, which is not a JSON value")
    return value
