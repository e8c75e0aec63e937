"""Scores a generated call against the reference by comparing parsed values, not text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallScore:
    """1 for the right function with the right arguments, `partial` for the right function alone, otherwise 0.

    The order of keys, white space and the spelling of a number make no difference. If the reference is not a call, the
    answer must equal it.
    """

    partial: float

    def __call__(self, prediction: str, reference: str) -> float:
        expected, called = read_call(reference), read_call(prediction)
        if expected is None:
            return float(prediction.strip() == reference.strip())
        if called is None or called["function"] != expected["function"]:
            return 0.0
        return 1.0 if equal(called["arguments"], expected["arguments"]) else self.partial


def read_call(text: str) -> dict[str, Any] | None:
    """Return `{"function": name, "arguments": {...}}` if that is the whole text, otherwise None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, a number of thousands of digits, or thousands of brackets
        return None
    if not isinstance(value, dict) or value.keys() != {"function", "arguments"}:
        return None
    is_call = isinstance(value["function"], str) and isinstance(value["arguments"], dict)
    return value if is_call else None


def equal(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal. Python's == takes true for 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(isinstance(a, bool) == isinstance(b, bool) and a == b)
