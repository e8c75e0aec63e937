"""The files of `sftx generate`: the rows that it reads, and the answers that it writes and goes on with.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from sftx import atomic_files
from sftx.config.options import Source
from sftx.data import sources
from sftx.data.row_encoder import EncodedRow, mark_trained, parse_record
from sftx.errors import DataError, OutputError, SftxError, kind_of, one_line
from sftx.serving.run_plugins import RunPlugins
from sftx.types import Parsed, Record

log = logging.getLogger(__name__)

_CHANGES_NOTHING: Final = frozenset({"batch_size"})
"""Options that change answers by rounding at most."""


def keep_stdin(directory: Path, stream: TextIO) -> Path:
    """Return a file with the rows that come from a pipe. Raises DataError for none."""
    path = directory / "rows.jsonl"
    size = 0
    with path.open("wb") as file:
        while piece := stream.buffer.read(2**20):
            size += file.write(piece)
    if not size:
        raise DataError("--data -: the input is empty; write rows to it, one JSON object a line")
    return path


def parsed_rows(rows: Sequence[Source], plugins: RunPlugins, stdin: Path | None) -> Iterator[tuple[EncodedRow, Parsed]]:
    """Yield each row of the sources as its parser reads it; a row with a prompt alone is a turn of the user.

    `stdin`: the file that standard input was kept in. Raises DataError for a row that cannot be read.
    """
    config, parsers = plugins.config.data, plugins.assembly.parsers()
    for source in rows:
        for where, record in sources.read(source, plugins.assembly.row_sources, encoding=config.encoding):
            row = EncodedRow(where if stdin is None else dataclasses.replace(where, path="-"))
            try:
                [*parsed] = parse_record(_with_messages(record, source), row, parsers, source, config)
            except SftxError as error:
                if str(row.where) not in str(error):
                    error.args = (f"{row.where}: {error}",)
                raise
            if not parsed:
                raise DataError(f"{row.where}: its parser makes nothing of it")
            yield row, mark_trained(parsed[0], config)  # of a preference pair, the preferred answer


def _with_messages(record: Record, source: Source) -> Record:
    """Return a record that has a prompt and nothing else that is known as one of messages."""
    prompt = record.get("prompt")
    if source.columns or "completion" in record or "messages" in record or "prompt" not in record:
        return record
    if not isinstance(prompt, str | list):
        raise DataError(f"its prompt is {kind_of(prompt)}, expected a text or a list of messages")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"messages": messages} | ({"tools": record["tools"]} if "tools" in record else {})


class AnswersFile:
    """A file of answers, and beside it a summary: with which options it was begun, and the scores at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary_path = path.with_name(f"{path.stem}.summary.json")

    def check(self, *, overwrite: bool) -> None:
        """Raise OutputError for a file that was not begun here, or a place where none can be written."""
        if self.path.suffix not in (".jsonl", ".ndjson"):
            raise OutputError(f"--out {self.path}: JSON lines are written; name a file that ends in .jsonl or .ndjson")
        if self.path.is_dir():
            raise OutputError(f"--out {self.path}: is a directory; name a file in it")
        if not self.path.parent.is_dir():
            raise OutputError(f"--out {self.path}: there is no directory {self.path.parent}; make it first")
        for path in (self.path if self.path.exists() else self.path.parent, self.path.parent):
            if not os.access(path, os.W_OK):
                raise OutputError(f"--out {self.path}: {path} may not be written to; choose another place")
        if self.path.exists() and not overwrite and not self.summary_path.exists():
            raise OutputError(
                f"--out {self.path}: exists already, and {self.summary_path.name}, with which it would be gone on "
                "with, does not; choose another name, or give --overwrite"
            )

    def check_apart(self, rows: Sequence[Source]) -> None:
        """Raise OutputError where the answers, or their summary, would be written to what the rows are read from."""
        for source in rows:
            for path in (self.path, self.summary_path):
                if sources.holds(source, path):
                    raise OutputError(
                        f"--out {self.path}: {path} is or would be among the rows of --data {source.path}; choose "
                        "another place"
                    )

    def begin(self, options: Mapping[str, Any], *, overwrite: bool) -> tuple[TextIO, list[dict[str, Any]]]:
        """Return the file to append to, and the lines that are there already.

        It is this process's own until it is closed. Raises OutputError where the lines were written with other options.
        """
        is_new = not self.path.exists()
        try:
            file = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"--out {self.path}: cannot be written: {one_line(error)}") from error
        try:
            self._lock(file)
            lines: list[dict[str, Any]] = []
            if overwrite:
                file.truncate(0)
            elif file.tell():
                self._check_same(options)
                lines = self._whole_lines()
            atomic_files.write_json(self.summary_path, {"options": options, "is_complete": False})
        except BaseException:
            file.close()
            if is_new:
                self.path.unlink()
            raise
        return file, lines

    def _lock(self, file: TextIO) -> None:
        with contextlib.suppress(ImportError):  # Windows has no such module
            import fcntl

            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"--out {self.path}: another process is writing it; wait for its end, or choose another name"
                ) from None
            except OSError as error:  # a file system without locks
                log.info("%s: cannot be locked: %s; let one process write it", self.path, one_line(error))

    def _check_same(self, options: Mapping[str, Any]) -> None:
        try:
            before = dict(json.loads(self.summary_path.read_text(encoding="utf-8"))["options"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{self.summary_path}: cannot be read: {one_line(error)}; give --overwrite") from error
        now = json.loads(json.dumps(options))
        names = sorted({*before, *now} - _CHANGES_NOTHING)
        if different := [name for name in names if before.get(name) != now.get(name)]:
            shown = "; ".join(
                f"{name.replace('_', ' ')}: {_shown(before.get(name))} then, {_shown(now.get(name))} now"
                for name in different
            )
            raise OutputError(
                f"--out {self.path}: was begun with other options ({shown}); give the same, choose another name, or "
                "give --overwrite"
            )

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Return the lines that were written to their end, and cut off the rest of the file."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [dict(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise OutputError(f"--out {self.path}: has a line that was not written here; give --overwrite") from error
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return lines

    def finish(self, options: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        atomic_files.write_json(self.summary_path, {"options": options, "is_complete": True, **summary})


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def write_line(file: TextIO, line: Mapping[str, Any]) -> None:
    """Write a line at once and whole, so that only the last one can be cut when the process is killed."""
    try:
        text = json.dumps(line, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only hold as an escape
        text = json.dumps(line)
    file.write(text + "\n")
    file.flush()
