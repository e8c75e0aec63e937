"""Write files of rows into the current directory and read them back, or return their error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sftx import DataError
from sftx.config.options import Source
from sftx.data import sources

TEXT = "你好, naïve café 🙂\u2028\u0085 «x»"


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def rows(name: str, content: str | bytes) -> list[tuple[str, Any]]:
    """Return the records of a file with that content, with their locations as errors show them."""
    return [(str(where), record) for where, record in sources.read(Source(write(name, content)))]


def error_of(name: str, content: str | bytes | None = None) -> str:
    with pytest.raises(DataError) as caught:
        list(sources.read(Source(name)) if content is None else sources.read(Source(write(name, content))))
    message = str(caught.value)
    assert "\n" not in message
    return message
