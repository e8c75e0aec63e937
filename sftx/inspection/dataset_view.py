"""A run's options become its data as training would get it, for commands that look and do not train.

What would stop a run does not stop a look: it is told as one of the problems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from sftx.assembly.registry import activate
from sftx.config.loading import Loaded
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import pipeline, sources, wanted
from sftx.data.dataset import Dataset
from sftx.data.ledger import Entry
from sftx.data.pipeline import DataPipeline
from sftx.data.row_encoder import EMPTY, NO_TURN, NOTHING_TRAINED, RowEncoder
from sftx.errors import DataError
from sftx.model import names
from sftx.types import Location, Record

Split = Literal["train", "eval"]
_WHAT_ENCODED_ROWS_LACK: Final = frozenset({NOTHING_TRAINED, EMPTY, NO_TURN})


@dataclass
class Look:
    """A run that is looked at."""

    config: RunConfig
    """As the user wrote it."""
    prepared: DataPipeline
    """Made with options that let every row be seen: one that cannot be read is dropped, and drops stop nothing."""
    _datasets: dict[Split, Dataset] = field(default_factory=dict)
    _problems: dict[Split, list[str]] = field(default_factory=dict)

    def sources(self, split: Split) -> tuple[Source, ...]:
        """What is read; of a stream only as much as its first window takes."""
        return self.prepared.config.train if split == "train" else self.prepared.config.eval

    def dataset(self, split: Split) -> Dataset:
        """The encoded rows. Raises DataError only for what cannot be read at all."""
        if split not in self._datasets:
            prepared = self.prepared
            data = prepared.load_train(check=False) if split == "train" else prepared.load_eval(check=False)
            self._datasets[split] = data
            self._problems[split] = list(_would_stop(data, self.config.data, prepared.encode))
        return self._datasets[split]

    def problems(self, split: Split) -> tuple[str, ...]:
        """What would stop a run on these rows, as it would say it."""
        self.dataset(split)
        return tuple(dict.fromkeys(self._problems[split]))

    def records(self, split: Split) -> Iterator[tuple[Source, Location, Record]]:
        """Every row as it was written."""
        for source in self.sources(split):
            yield from ((source, where, record) for where, record in sources.read(source))


def is_unreadable(entry: Entry) -> bool:
    """Whether the ledger's entry is of a row that no parser could read."""
    return entry.action == "dropped" and not entry.length and entry.reason not in _WHAT_ENCODED_ROWS_LACK


def _would_stop(data: Dataset, config: DataConfig, encode: RowEncoder) -> Iterator[str]:
    if config.invalid_rows == "error":
        unreadable = [entry for entry in data.ledger.entries if is_unreadable(entry)]
        yield from (f"{entry.where}: {entry.reason}" for entry in unreadable[:1])
    try:
        data.check(encode, max_dropped=config.max_dropped)
    except DataError as error:
        yield str(error)


def look(loaded: Loaded) -> Look:
    """Everything that needs no data and no weights. Raises SftxError."""
    config = loaded.config
    names.check(config.model)
    wanted.check(config)
    assembly = activate(loaded)
    lenient = dataclasses.replace(config, data=_lenient(config.data))
    return Look(config, pipeline.build_pipeline(lenient, assembly, loaded.origins))


def _lenient(data: DataConfig) -> DataConfig:
    if data.streaming:  # what would be planned first
        rows = -(-data.plan_window // len(data.train))
        limited = [dataclasses.replace(s, limit=min(rows, s.limit or rows)) for s in data.train]
        data = dataclasses.replace(data, train=tuple(limited), streaming=False)
    return dataclasses.replace(data, invalid_rows="drop", max_dropped=1.0)


def kinds(entries: Iterable[Entry], key: Callable[[Entry], str]) -> Mapping[str, list[Entry]]:
    """The entries by `key`, the most frequent first."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
