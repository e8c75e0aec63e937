"""JSON that is read piece by piece: of a list of any size, one item is held at a time."""

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


class JsonText:
    """The text of `pieces` from the front to the back; what is behind is forgotten."""

    def __init__(self, pieces: Iterator[str], path: str) -> None:
        self._pieces = pieces
        self._path = path
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._line = 1
        """Of `_at`, once `where` has counted."""
        self._counted = 0
        self._before = 0
        """Characters of the first line of `_text` that are forgotten."""

    def where(self) -> Location:
        """The line that comes next."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return Location(self._path, self._line)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or not self._read_more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Passes over the character that `peek` saw."""
        self._at += 1

    def value(self) -> Any:
        """The JSON value that comes next. Raises DataError with its line."""
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._read_more():
                    continue
                line = self.where().number + self._text.count("\n", self._at, error.pos)
                column = error.colno + (self._before if error.lineno == 1 else 0)
                where = Location(self._path, line)
                raise DataError(f"{where}: not valid JSON: {error.msg} at column {column}") from None
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self.where()}: not readable JSON: {limit(error)}") from None

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may be right when more of it has been read."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_WORD

    def _read_more(self) -> bool:
        """Reads at least as much as is held already, so that a long value is not begun too often; False at the end."""
        read: list[str] = []
        num_read, wanted = 0, max(len(self._text) - self._at, _READ_CHARS)
        while num_read < wanted and (piece := next(self._pieces, None)) is not None:
            read.append(piece)
            num_read += len(piece)
        if read:
            self.where()
            newline = self._text.rfind("\n", 0, self._at)
            self._before = self._before + self._at if newline < 0 else self._at - newline - 1
            self._text = "".join([self._text[self._at :], *read])
            self._at = self._counted = 0
        return bool(read)


def limit(error: RecursionError | ValueError) -> str:
    """What valid JSON was too much for Python's reader."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
