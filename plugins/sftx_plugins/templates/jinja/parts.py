"""The parts of a rendering with placeholders, and the row's texts filled in for the placeholders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

from sftx import DataError
from sftx_plugins.templates.jinja.placeholders import FIRST_PLACEHOLDER, PLACEHOLDER, Placeholders


class Part(NamedTuple):
    """A part of a rendering with placeholders: a control token, the template's own text, or a placeholder."""

    start: int
    end: int
    """Characters of the rendering. Those of a control token include white space that the token strips."""
    text: str
    control: bool = False
    placeholder: int | None = None
    """The number of the placeholder, if the part is one."""


class Scanner:
    """Splits a rendering with placeholders into parts. The longest control token wins, as in a tokenizer."""

    def __init__(self, controls: Mapping[str, Any]) -> None:
        """`controls` maps each control token to its AddedToken, which says whether it strips white space beside it."""
        tokens = [
            (r"\s*" if token.lstrip else "") + re.escape(text) + (r"\s*" if token.rstrip else "")
            for text, token in sorted(controls.items(), key=lambda item: -len(item[0]))
        ]
        self._controls = controls
        self._pattern = re.compile("|".join([f"(?P<placeholder>{PLACEHOLDER.pattern})", *tokens]))

    def parts(self, text: str, repeats: Sequence[int]) -> list[Part]:
        """Return the parts of `text`; `repeats` says how many characters each placeholder has."""
        parts: list[Part] = []
        at = 0
        while match := self._pattern.search(text, at):
            if at < match.start():
                parts.append(Part(at, match.start(), text[at : match.start()]))
            at = match.end()
            if match["placeholder"] is None:
                token = match[0] if match[0] in self._controls else match[0].strip()
                parts.append(Part(match.start(), at, token, control=True))
            else:
                number = ord(match[0]) - FIRST_PLACEHOLDER
                at = match.start() + repeats[number]
                if text[match.start() : at] != match[0] * repeats[number]:
                    raise DataError("the chat template writes a part of an identifier")
                parts.append(Part(match.start(), at, match[0], placeholder=number))
        if at < len(text):
            parts.append(Part(at, len(text), text[at:]))
        return parts


def split_parts(parts: Sequence[Part], places: Iterable[int]) -> list[Part]:
    """Return the parts with the template's own text split at these characters."""
    result = list(parts)
    for place in places:
        for index, part in enumerate(result):
            if part.start < place < part.end and not part.control and part.placeholder is None:
                size = place - part.start
                halves = [Part(part.start, place, part.text[:size]), Part(place, part.end, part.text[size:])]
                result[index : index + 1] = halves
                break
    return result


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


_SPELLINGS: Final[tuple[Callable[[str], str], ...]] = (
    str,
    _json,
    lambda text: _json(_json(text)),
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)
"""How templates write a text: as it is, in JSON, in JSON within JSON, in ASCII JSON, or as a Python literal."""


def fill(parts: Sequence[Part], rendering: str, placeholders: Placeholders, expected: str) -> list[str]:
    """Return the text of each part with the row's texts filled in.

    `rendering` is the text with placeholders, `expected` the rendering of the conversation itself. Raises DataError
    unless the filled parts are `expected`, character for character: the template has then changed a text or decided
    something by it.
    """
    texts = [
        rendering[part.start : part.end] if part.placeholder is None else placeholders.texts[part.placeholder]
        for part in parts
    ]
    if "".join(texts) == expected:
        return texts
    at = 0
    for index, part in enumerate(parts):
        if part.placeholder is not None:
            text = texts[index]
            is_followed = index + 1 < len(parts) and parts[index + 1].placeholder is None
            after = rendering[part.end : parts[index + 1].end] if is_followed else ""
            spellings = _SPELLINGS if not text.isalnum() or not text.isascii() else _SPELLINGS[:1]
            fitting = [s for s in {spell(text) for spell in spellings} if expected.startswith(s + after, at)]
            if len(fitting) > 1:
                raise DataError(f"the chat template writes {text!r:.60}, which can be read in more than one way")
            if not fitting:
                raise DataError(_difference(text, expected[at:]))
            texts[index] = fitting[0]
        elif not expected.startswith(texts[index], at):
            raise DataError(_difference(texts[index], expected[at:]))
        at += len(texts[index])
    if at < len(expected):
        raise DataError(_difference("the end", expected[at:]))
    return texts


def _difference(expected: str, written: str) -> str:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, written, strict=False)))
    start = max(0, same - 20)
    return (
        f"the chat template depends on the texts of this conversation: it wrote {written[start : same + 30]!r} where "
        f"{expected[start : same + 30]!r} was expected; put text that it reads as markup, such as <think>, into fields "
        "of its own (reasoning_content, tool_calls)"
    )
