"""The source `ini`: INI files, one row a section."""

from __future__ import annotations

import configparser
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sftx import ConfigError, DataError, Location, Record, RowSource, RunInfo, hookimpl


@dataclass(frozen=True, eq=False)
class Ini:
    """Reads INI files, one row a section: its keys are the fields, in the order of the file."""

    skip: Annotated[str, Field(description="A section of this name is no row; empty skips none.")] = "about"

    @hookimpl
    def sftx_source(self, run: RunInfo) -> RowSource:
        if run.config["data"]["streaming"] and self.skip == "everything":
            raise ConfigError("skip 'everything' leaves no row to stream")
        return Sections(self.skip)


class Sections:
    """Reads the files of one run."""

    scheme = "ini"

    def __init__(self, skip: str) -> None:
        self._skip = skip

    def _read(self, address: str) -> configparser.ConfigParser:
        parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=(";",))
        try:
            parser.read_string(Path(address).read_text(encoding="utf-8"), address)
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            raise DataError(f"{address}: cannot be read: {' '.join(str(error).split())}") from error
        return parser

    def check(self, address: str) -> None:
        if not Path(address).is_file():
            raise DataError(f"{address}: no such file")

    def rows(self, address: str, start: int) -> Iterator[tuple[Location, Record]]:
        parser = self._read(address)
        sections = [name for name in parser.sections() if name != self._skip]
        for number, name in islice(enumerate(sections, 1), start, None):
            yield Location(f"{address}[{name}]", number, "section"), dict(parser[name])

    def fingerprint(self, address: str) -> str:
        self.check(address)
        return f"{hashlib.sha256(Path(address).read_bytes()).hexdigest()} {self._skip}"

    def example(self, directory: Path, texts: Sequence[str]) -> str:
        parser = configparser.ConfigParser(interpolation=None)
        for number, text in enumerate(texts):
            parser[f"row {number}"] = {"prompt": "Say it.", "completion": text}
        file = directory / "rows.ini"
        with file.open("w", encoding="utf-8") as stream:
            parser.write(stream)
        return str(file)
