"""Nested options under dotted names, the names that `--set` and error messages use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one dict: `{"train": {"seed": 1}}` becomes `{"train.seed": 1}`.

    An empty mapping is kept as a value.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat
