"""A generated call and the right one become a score: parsed values are compared, not text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallScore:
    """1 for the right function with the right arguments, `partial` for the right function alone, otherwise 0.

    The order of keys, white space and the way a number is written count nothing. A reference that is no call, which a
    conversation may hold too, must be met word for word.
    """

    partial: float

    def __call__(self, prediction: str, reference: str) -> float:
        right, called = read_call(reference), read_call(prediction)
        if right is None:
            return float(prediction.strip() == reference.strip())
        if called is None or called["function"] != right["function"]:
            return 0.0
        return 1.0 if equal(called["arguments"], right["arguments"]) else self.partial


def read_call(text: str) -> dict[str, Any] | None:
    """`{"function": name, "arguments": {...}}` if the whole text is that; None when it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON; a number of thousands of digits; thousands of brackets
        return None
    if not isinstance(value, dict) or value.keys() != {"function", "arguments"}:
        return None
    is_call = isinstance(value["function"], str) and isinstance(value["arguments"], dict)
    return value if is_call else None


def equal(a: Any, b: Any) -> bool:
    """Equality of JSON values. Python's own takes true for 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(isinstance(a, bool) == isinstance(b, bool) and a == b)
