"""Write a run file with comments for its options."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final

from sftx.config.run_file import flow

_WIDTH: Final = 100


def commented(values: Mapping[str, Any], comments: Mapping[str, str], *, beside: bool = False) -> str:
    """Return the values of a run file as YAML. `comments` has the text for an option by its dotted name.

    A comment stands above its option, or with `beside` after it, where there is room.
    """
    return "\n".join(_lines(values, comments, "", beside=beside)) + "\n"


def _lines(values: Mapping[str, Any], comments: Mapping[str, str], prefix: str, *, beside: bool) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        is_section = isinstance(value, Mapping) and bool(value)
        line = f"{indent}{_text(name)}:" + ("" if is_section else f" {_text(value)}")
        comment = " ".join(comments.get(dotted, "").split())
        if comment and beside and len(line) + len(comment) < _WIDTH:
            line += f"  # {comment}"
        elif comment:
            start = f"{indent}# "
            yield from textwrap.wrap(
                comment, _WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
            )
        yield line
        if is_section:
            yield from _lines(value, comments, f"{dotted}.", beside=beside)


def _text(value: Any) -> str:
    """Return the value on one line."""
    text = flow(value)
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
