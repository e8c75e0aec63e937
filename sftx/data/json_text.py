"""Decode JSON text piece by piece, so that only one item of a list is held in memory at a time.

`ijson` (3.6, backend yajl2_c) would do the same 1.5 times as fast, but does not tell an item's line, reads a lone
surrogate as "?", and refuses NaN and integers of more than 64 bits, which the reader of JSON lines accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from sftx.errors import DataError
from sftx.types import Location

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_READ_CHARS: Final = 2**16
_LONGEST_WORD: Final = len("-Infinity")


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs. Raises ValueError for a key with two values, of which a dict would lose one."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwoValuesError(next(name for name in names if names.count(name) > 1))
    return values


class _TwoValuesError(ValueError):
    """A key of an object has two values."""


DECODER: Final = json.JSONDecoder(object_pairs_hook=_with_unique_keys)


class JsonText:
    """JsonText is a position in the text of `pieces` that only moves forward; the text before it is discarded."""

    def __init__(self, pieces: Iterator[str], path: str) -> None:
        self._pieces = pieces
        self._path = path
        self._text = ""
        self._at = 0
        self._line = 1
        """Line number of the character at `_counted`."""
        self._counted = 0
        self._before = 0
        """Number of discarded characters in the line with which `_text` begins."""

    def where(self) -> Location:
        """Return the location of the next character."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return Location(self._path, self._line)

    def peek(self) -> str:
        """Move to the next character that is no white space, and return it; return an empty text at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or not self._read_more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Move past the character that `peek` returned."""
        self._at += 1

    def value(self) -> Any:
        """Decode the next JSON value. Raises DataError with the line of the error."""
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                # The value may be complete once more text is read.
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_WORD
                if is_cut and self._read_more():
                    continue
                line = self.where().number + self._text.count("\n", self._at, error.pos)
                column = error.colno + (self._before if error.lineno == 1 else 0)
                where = Location(self._path, line)
                raise DataError(f"{where}: not valid JSON: {said(error)} at column {column}") from None
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self.where()}: not readable JSON: {limit(error)}") from None

    def _read_more(self) -> bool:
        """Read more text, and return False at the end.

        The text is at least doubled, so that the time for a long value, which is decoded anew each time, stays linear.
        """
        read: list[str] = []
        num_read, num_chars = 0, max(len(self._text) - self._at, _READ_CHARS)
        while num_read < num_chars and (piece := next(self._pieces, None)) is not None:
            read.append(piece)
            num_read += len(piece)
        if read:
            self.where()  # count the lines of the text that is discarded now
            newline = self._text.rfind("\n", 0, self._at)
            self._before = self._before + self._at if newline < 0 else self._at - newline - 1
            self._text = "".join([self._text[self._at :], *read])
            self._at = self._counted = 0
        return bool(read)


def said(error: json.JSONDecodeError) -> str:
    """Return what is wrong with a JSON text, in words that "at" and a place can follow."""
    return error.msg.removesuffix(" at")  # Python says "Invalid control character at"


def limit(error: RecursionError | ValueError) -> str:
    """Return why valid JSON is not read: a limit of Python's decoder, or a key that has two values."""
    if isinstance(error, _TwoValuesError):
        return f"the key {str(error)!r} has two values in one object; keep one"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
