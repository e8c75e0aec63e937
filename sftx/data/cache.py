"""Encoded rows are kept on disk under a name that says all they were made from, so that a stale one cannot be used.

A directory appears whole, by renaming, or not at all; what a killed process left behind is swept away by the next.
"""

from __future__ import annotations

import dataclasses
import fcntl
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sftx.config.options import DataConfig, Source
from sftx.data import sources
from sftx.data.dataset import Dataset, Examples
from sftx.data.ledger import Ledger
from sftx.data.row_encoder import Question, RowEncoder
from sftx.errors import OutputError, one_line
from sftx.paths import cache_dir

log = logging.getLogger(__name__)

_LIBRARIES: Final = ("tokenizers", "transformers", "jinja2", "numpy")
_PART: Final = ".part-"
_YOUNG_S: Final = 10
# What decides how an epoch is put together, or how fast, but not what a row becomes.
_NOT_OF_A_ROW: Final = (
    "train", "eval", "mix_strategy", "max_dropped", "streaming", "plan_window", "num_proc", "cache",
)  # fmt: skip


@dataclass(frozen=True)
class Cache:
    """One encoded split, kept in `directory`."""

    directory: Path

    @classmethod
    def of(cls, wanted: Sequence[Source], encode: RowEncoder, identity: Mapping[str, Any]) -> Cache:
        """Where this very encoding is kept: by content of the data, template, tokenizer, options, code and versions."""
        tokenizer = encode.encoder.tokenizer
        made_from = {
            "sources": [
                {**dataclasses.asdict(source), "weight": None, "content": sources.fingerprint(source)}
                for source in wanted
            ],
            "options": {name: value for name, value in _options(encode.config).items() if name not in _NOT_OF_A_ROW},
            "questions": encode.questions,
            "wrapped": encode.wrapped,
            "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template],
            "plugins": identity,
            "sftx": [code_digest("sftx.data"), code_digest("sftx.types")],
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
        text = json.dumps(made_from, sort_keys=True, default=str)
        return cls(cache_dir() / "encoded" / hashlib.sha256(text.encode()).hexdigest()[:32])

    def load(self) -> Dataset | None:
        """What was kept; None when nothing was, or not as it was written."""
        if not self.directory.is_dir():
            return None
        try:
            return self._load()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged and not used: %s", self.directory, one_line(error))
            shutil.rmtree(self.directory, ignore_errors=True)
            return None

    def _load(self) -> Dataset:
        described = json.loads((self.directory / "dataset.json").read_text(encoding="utf-8"))
        with (self.directory / "ledger.jsonl").open(encoding="utf-8") as lines:
            ledger = Ledger(Ledger.read(lines), described["num_rows"])
        with (self.directory / "questions.jsonl").open(encoding="utf-8") as lines:
            questions = [Question(**json.loads(line)) for line in lines]
        log.info("the encoded rows come from %s", self.directory)
        return Dataset(
            examples=Examples.load(self.directory),
            questions=questions,
            ledger=ledger,
            formats=Counter(described["formats"]),
            trains_stop=described["trains_stop"],
            has_turns=described["has_turns"],
        )

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A directory to be filled, which becomes the cache's when all went well. Raises OutputError."""
        home = self.directory.parent
        with _explained(home):
            home.mkdir(parents=True, exist_ok=True)
            _sweep(home)
            part = Path(tempfile.mkdtemp(dir=home, prefix=_PART))
            part.chmod(home.stat().st_mode)  # who may read the cache may read what is in it
        try:
            with (part / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system, should this process be killed
                yield part
                with _explained(home):
                    try:
                        part.replace(self.directory)
                    except OSError:
                        if not self.directory.is_dir():  # else another process was faster, with the same
                            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def save(self, data: Dataset, directory: Path) -> None:
        """Writes all but the examples, which lie there already."""
        described = {
            "num_rows": data.ledger.num_rows,
            "formats": data.formats,
            "trains_stop": data.trains_stop,
            "has_turns": data.has_turns,
        }
        with _explained(directory):
            (directory / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
            data.ledger.write(directory / "ledger.jsonl")
            with (directory / "questions.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(dataclasses.asdict(question)) + "\n" for question in data.questions)


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{home}: cannot be written: {one_line(error)}; set SFTX_CACHE to a place that can, or data.cache=false"
        ) from error


def _options(config: DataConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _sweep(home: Path) -> None:
    """Removes what processes left behind that are no more: they hold no lock."""
    for part in home.glob(f"{_PART}*"):
        try:
            if time.time() - part.stat().st_mtime < _YOUNG_S:
                continue  # made just now, perhaps not locked yet
            with (part / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            continue  # somebody's who is at work, or another user's
        except FileNotFoundError:
            pass  # killed before it locked
        shutil.rmtree(part, ignore_errors=True)


def code_digest(package: str) -> str:
    """SHA-256 of the files of an imported package, or of a single module: a version that nobody forgets.

    Of what the package calls elsewhere, other than sftx, only versions are known.
    """
    module = sys.modules[package]
    digest = hashlib.sha256()
    roots = [Path(path) for path in getattr(module, "__path__", ())]
    files = [(root, file) for root in roots for file in sorted(root.rglob("*")) if file.is_file()]
    if not roots and getattr(module, "__file__", None):
        files = [(Path(str(module.__file__)).parent, Path(str(module.__file__)))]
    for root, file in files:
        if "__pycache__" not in file.parts:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
