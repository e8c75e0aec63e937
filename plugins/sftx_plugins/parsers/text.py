"""`{"text": ...}`: plain text, for continued pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sftx import Location, Parser, PlainText, Record, hookimpl
from sftx_plugins.parsers import _values


@dataclass(frozen=True, eq=False)
class Text:
    """Text without turns. Every token is trained, and no template is needed."""

    fields: ClassVar[str] = "text"
    samples: ClassVar[Sequence[Record]] = (
        {"text": "The quick brown fox jumps over the lazy dog."},
        {"text": "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。", "source": "李白"},
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return "text" in record

    def parse(self, record: Record, where: Location) -> tuple[PlainText, ...]:
        return (PlainText(_values.text(record.get("text"), "text", where)),)
