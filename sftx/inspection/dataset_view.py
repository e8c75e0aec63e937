"""The data of a run as training would encode it, for commands that show or check rows and do not train.

Errors that would stop a run are collected in `DatasetView.problems` instead of being raised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from sftx.assembly.registry import activate
from sftx.config.loading import LoadedConfig
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import sources
from sftx.data.dataset import Dataset
from sftx.data.ledger import Entry, Ledger
from sftx.data.pipeline import DataPipeline, Split, build_pipeline
from sftx.data.row_encoder import EMPTY, NO_TURN, NOTHING_TRAINED
from sftx.errors import DataError
from sftx.model import names
from sftx.phases import phase
from sftx.types import Location, Record

_REASONS_AFTER_PARSING: Final = frozenset({NOTHING_TRAINED, EMPTY, NO_TURN})
"""The reasons for which a row is dropped although a parser could read it."""


@dataclass
class DatasetView:
    """The data of one run, read and encoded on demand."""

    config: RunConfig
    """The options as the user gave them."""
    pipeline: DataPipeline
    """It is built with lenient options: unreadable rows are dropped, and no share of dropped rows is an error."""
    _datasets: dict[Split, Dataset] = field(default_factory=dict)
    _problems: dict[Split, tuple[str, ...]] = field(default_factory=dict)

    def sources(self, split: Split) -> tuple[Source, ...]:
        """Return the sources of a split; streamed sources are limited to the rows of the first plan window."""
        return self.pipeline.sources(split)

    def dataset(self, split: Split) -> Dataset:
        """Return the encoded rows of a split. Raises DataError only for a source that cannot be read at all."""
        if split not in self._datasets:
            is_train = split == "train"
            data = self.pipeline.load_train(check=False) if is_train else self.pipeline.load_eval(check=False)
            problems, checked = [], data
            unreadable = [entry for entry in data.ledger.entries if is_unreadable(entry)]
            if self.config.data.invalid_rows == "error" and unreadable:
                # A run stops at the first of them. What else stops it is what remains when they are corrected.
                problems.append(f"{unreadable[0].where}: {unreadable[0].reason}")
                entries = [entry for entry in data.ledger.entries if not is_unreadable(entry)]
                rest = Ledger(entries, data.ledger.num_rows - len(unreadable))
                checked = dataclasses.replace(data, ledger=rest)
            try:
                checked.check(self.pipeline.encode, max_dropped=self.config.data.max_dropped)
            except DataError as error:
                problems.append(str(error))
            self._datasets[split] = data
            self._problems[split] = tuple(problems)
        return self._datasets[split]

    def problems(self, split: Split) -> tuple[str, ...]:
        """Return the messages of the errors with which a run would stop on the rows of a split."""
        self.dataset(split)
        return self._problems[split]

    def records(self, split: Split) -> Iterator[tuple[Source, Location, Record]]:
        """Yield every row of a split as its source has it; among the training rows are those that are held out."""
        part = self.pipeline.part(split) if split == "eval" else None
        for number, source in enumerate(self.sources(split)):
            rows = sources.read(source, self.pipeline.assembly.row_sources, encoding=self.config.data.encoding)
            if part is not None:
                rows = part.rows(number, rows, [])
            yield from ((source, where, record) for where, record in rows)


def is_unreadable(entry: Entry) -> bool:
    """Return whether the ledger's entry is about a row that no parser could read."""
    return entry.action == "dropped" and not entry.length and entry.reason not in _REASONS_AFTER_PARSING


def view_dataset(loaded: LoadedConfig) -> DatasetView:
    """Load plugins and tokenizer of a run; neither rows nor weights are read yet. Raises SftxError."""
    config = loaded.config
    names.check(config.model)
    with phase("importing", "plugins"):
        assembly = activate(loaded)
    sources.check_data_config(config, assembly.row_sources)
    lenient = dataclasses.replace(config, data=_lenient(config.data))
    with phase("loading", "the tokenizer"):
        return DatasetView(config, build_pipeline(lenient, assembly, loaded.origins))


def _lenient(data: DataConfig) -> DataConfig:
    """Return options with which every row can be looked at, and a stream is its first plan window."""
    if data.streaming:
        rows = -(-data.plan_window // len(data.train))
        limited = [dataclasses.replace(s, limit=min(rows, s.limit or rows)) for s in data.train]
        data = dataclasses.replace(data, train=tuple(limited), streaming=False)
    return dataclasses.replace(data, invalid_rows="drop", max_dropped=1.0)
