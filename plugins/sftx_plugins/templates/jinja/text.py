"""What a template wrote of letters becomes parts: control tokens, its own text, and places of the conversation's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

from sftx import DataError
from sftx_plugins.templates.jinja.data import FIRST_LETTER, LETTER, Letters


class Part(NamedTuple):
    """A stretch of what was written: a control token, text of the template, or the place of a conversation's text."""

    start: int
    end: int
    """Characters of the text with letters; those of a control token include white space that it swallows."""
    text: str
    control: bool = False
    number: int | None = None
    """Of the conversation's text that stands here, among its letters."""


class Scanner:
    """Finds control tokens and letters in a text; the longest token wins, as in a tokenizer."""

    def __init__(self, controls: Mapping[str, Any]) -> None:
        """`controls`: each token's AddedToken, which says whether it swallows the white space beside it."""
        tokens = [
            (r"\s*" if token.lstrip else "") + re.escape(text) + (r"\s*" if token.rstrip else "")
            for text, token in sorted(controls.items(), key=lambda item: -len(item[0]))
        ]
        self._controls = controls
        self._pattern = re.compile("|".join([f"(?P<letter>{LETTER.pattern})", *tokens]))

    def parts(self, text: str, repeats: Sequence[int]) -> list[Part]:
        found: list[Part] = []
        at = 0
        while match := self._pattern.search(text, at):
            if at < match.start():
                found.append(Part(at, match.start(), text[at : match.start()]))
            at = match.end()
            if match["letter"] is None:
                token = match[0] if match[0] in self._controls else match[0].strip()
                found.append(Part(match.start(), at, token, control=True))
            else:
                number = ord(match[0]) - FIRST_LETTER
                at = match.start() + repeats[number]
                if text[match.start() : at] != match[0] * repeats[number]:
                    raise DataError("the template cuts an identifier to pieces")
                found.append(Part(match.start(), at, match[0], number=number))
        if at < len(text):
            found.append(Part(at, len(text), text[at:]))
        return found


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


_SPELLINGS: Final[tuple[Callable[[str], str], ...]] = (
    str,
    _json,
    lambda text: _json(_json(text)),
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)
"""How a template may write a text: as it is, within JSON, within JSON as text of JSON, in ASCII, as Python does."""


def fill(parts: Sequence[Part], written: str, letters: Letters, rendered: str) -> list[str]:
    """The text of each part, of which `rendered`, what the template wrote of the conversation itself, must consist.

    `written` is the text of the parts. Raises DataError where the two part: the template has looked into a text.
    """
    plain = [written[part.start : part.end] if part.number is None else letters.texts[part.number] for part in parts]
    if "".join(plain) == rendered:
        return plain
    at = 0
    for index, part in enumerate(parts):
        if part.number is not None:
            after = written[part.end : parts[index + 1].end] if _is_text(parts, index + 1) else ""
            spelled = {spell(plain[index]) for spell in _spellings(plain[index])}
            fitting = [text for text in spelled if rendered.startswith(text + after, at)]
            if len(fitting) != 1:
                raise DataError(_why_not(plain[index], rendered[at:], ambiguous=len(fitting) > 1))
            plain[index] = fitting[0]
        elif not rendered.startswith(plain[index], at):
            raise DataError(_why_not(plain[index], rendered[at:]))
        at += len(plain[index])
    if at < len(rendered):
        raise DataError(_why_not("the end", rendered[at:]))
    return plain


def _is_text(parts: Sequence[Part], index: int) -> bool:
    return index < len(parts) and parts[index].number is None


def _spellings(text: str) -> tuple[Callable[[str], str], ...]:
    return _SPELLINGS if not text.isalnum() or not text.isascii() else _SPELLINGS[:1]


def _why_not(expected: str, got: str, *, ambiguous: bool = False) -> str:
    if ambiguous:
        return f"how the template wrote {expected!r:.60} can be read in more than one way"
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, got, strict=False)))
    start = max(0, same - 20)
    return (
        f"the template looks into the texts of this conversation: it wrote {got[start : same + 30]!r} where "
        f"{expected[start : same + 30]!r} was expected; what it reads as markup, such as <think>, belongs into fields "
        "of its own (reasoning_content, tool_calls)"
    )
