"""Cache encoded rows on disk under a key that depends on everything they were made from, so that none can be stale.

An entry is a directory, which is written beside its place and renamed into it. Unlike `atomic_files.atomic_directory`,
several processes can write the same entry at the same time: each writes a directory of its own and holds a lock on it,
the first to finish provides the entry. The next run removes the directories of killed processes, which hold no lock.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from sftx.atomic_files import sha256_of_file
from sftx.config.options import Source
from sftx.data import sources
from sftx.data.dataset import Dataset, Examples
from sftx.data.ledger import LINE_ERRORS, Ledger
from sftx.data.row_encoder import RowEncoder
from sftx.data.sources import NO_PLUGINS, RowSources
from sftx.errors import OutputError, one_line
from sftx.paths import cache_dir
from sftx.types import Message, Question, ToolCall

log = logging.getLogger(__name__)

_LIBRARIES: Final = ("tokenizers", "transformers", "jinja2", "numpy")
_PART: Final = ".part-"
_LOCK: Final = ".lock-"
"""The lock of a directory is a file beside it: Windows renames no directory with an open file."""
_UNLOCKED_S: Final = 10
"""Seconds for which a new directory may have no lock yet."""
_NO_EFFECT_ON_ROWS: Final = (
    "train", "eval", "mix_strategy", "max_dropped", "max_overlap", "streaming", "plan_window", "num_proc", "cache",
)  # fmt: skip
"""Options of `data` that decide how an epoch is put together or how fast rows are encoded, but not what they become."""


@dataclass(frozen=True)
class Cache:
    """A cache entry holds the encoded training rows or held-out rows of a run."""

    directory: Path

    @classmethod
    def of(
        cls,
        source_list: Sequence[Source],
        encode: RowEncoder,
        identity: Mapping[str, Any],
        row_sources: RowSources = NO_PLUGINS,
    ) -> Cache | None:
        """Return the entry of this encoding, None when a source cannot tell whether its rows change.

        `identity` describes the plugins: names, options and source code.
        """
        contents = [sources.fingerprint(source, row_sources) for source in source_list]
        if None in contents:
            return None
        tokenizer = encode.encoder.tokenizer
        options = {field.name: getattr(encode.config, field.name) for field in dataclasses.fields(encode.config)}
        made_from = {
            "sources": [
                {**dataclasses.asdict(source), "weight": None, "content": content}
                for source, content in zip(source_list, contents, strict=True)
            ],
            "options": {name: value for name, value in options.items() if name not in _NO_EFFECT_ON_ROWS},
            "questions": encode.questions,
            "answer_length": encode.answer_length,
            "wrapped": encode.wrapped,
            "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template],
            "plugins": identity,
            "sftx": [code_digest("sftx.data"), code_digest("sftx.types")],
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
        text = json.dumps(made_from, sort_keys=True, default=str)
        return cls(cache_dir() / "encoded" / hashlib.sha256(text.encode()).hexdigest()[:32])

    def load(self) -> Dataset | None:
        """Return the cached rows, or None when there is no entry. A damaged entry is removed."""
        if not self.directory.is_dir():
            return None
        try:
            described = json.loads((self.directory / "dataset.json").read_text(encoding="utf-8"))
            with (self.directory / "ledger.jsonl").open(encoding="utf-8") as lines:
                ledger = Ledger(Ledger.read(lines), described["num_rows"])
            with (self.directory / "questions.jsonl").open(encoding="utf-8") as lines:
                questions = [_question(json.loads(line)) for line in lines]
            log.info("the encoded rows come from %s", self.directory)
            return Dataset(
                examples=Examples.load(self.directory),
                questions=questions,
                ledger=ledger,
                formats=Counter(described["formats"]),
                trains_stop=described["trains_stop"],
                has_turns=described["has_turns"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged and removed: %s", self.directory, one_line(error))
            shutil.rmtree(self.directory, ignore_errors=True)
            return None

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yield a directory to write to, which becomes the entry when the body ends without an error.

        Raises OutputError.
        """
        home = self.directory.parent
        with _as_output_error(home):
            home.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(home)
            part = Path(tempfile.mkdtemp(dir=home, prefix=_PART))
            part.chmod(home.stat().st_mode)  # mkdtemp makes a directory that only its owner can read
        try:
            with FileLock(_lock_of(part)):  # the system releases it when this process is killed
                yield part
                with _as_output_error(home):
                    try:
                        part.replace(self.directory)
                    except OSError:
                        if not self.directory.is_dir():  # otherwise another process wrote the same entry first
                            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            _remove_lock(_lock_of(part))

    def save(self, data: Dataset, directory: Path) -> None:
        """Write everything but the examples, which are in the directory already."""
        described = {
            "num_rows": data.ledger.num_rows,
            "formats": data.formats,
            "trains_stop": data.trains_stop,
            "has_turns": data.has_turns,
        }
        with _as_output_error(directory):
            (directory / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
            with (directory / "ledger.jsonl").open("w", encoding="utf-8", errors=LINE_ERRORS) as file:
                file.writelines(data.ledger.lines())
            with (directory / "questions.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(dataclasses.asdict(question)) + "\n" for question in data.questions)


def _question(values: dict[str, Any]) -> Question:
    """Return the row of the values that `dataclasses.asdict` gave, read back from JSON, which has no tuples."""
    messages = tuple(
        Message(**message | {"tool_calls": tuple(ToolCall(**call) for call in message["tool_calls"])})
        for message in values["messages"]
    )
    return Question(**values | {"messages": messages, "tools": tuple(values["tools"])})


@contextmanager
def _as_output_error(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{home}: cannot be written: {one_line(error)}; set SFTX_CACHE to a place that can, or data.cache=false"
        ) from error


def _remove_abandoned(home: Path) -> None:
    """Remove the unfinished directories of processes that no longer run, on which nobody holds a lock."""
    for part in home.glob(f"{_PART}*"):
        with suppress(Timeout, OSError):  # held by a running process, owned by another user, or just removed
            if time.time() - part.stat().st_mtime >= _UNLOCKED_S:
                with FileLock(_lock_of(part), timeout=0):
                    shutil.rmtree(part, ignore_errors=True)
    for lock in home.glob(f"{_LOCK}*"):
        if not lock.with_name(lock.name.replace(_LOCK, _PART, 1)).exists():
            _remove_lock(lock)


def _lock_of(part: Path) -> Path:
    return part.with_name(part.name.replace(_PART, _LOCK, 1))


def _remove_lock(lock: Path) -> None:
    with suppress(OSError):  # on Windows, another process has just opened it
        lock.unlink(missing_ok=True)


def code_digest(package: str) -> str:
    """Return a SHA-256 of all files of an imported package, or of a single module, in place of a version number."""
    module = sys.modules[package]
    digest = hashlib.sha256()
    roots = [Path(path) for path in getattr(module, "__path__", ())]
    files = [(root, file) for root in roots for file in sorted(root.rglob("*")) if file.is_file()]
    if not roots and getattr(module, "__file__", None):
        files = [(Path(str(module.__file__)).parent, Path(str(module.__file__)))]
    for root, file in files:
        if "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(root).as_posix()} {sha256_of_file(file)}\n".encode())
    return digest.hexdigest()
