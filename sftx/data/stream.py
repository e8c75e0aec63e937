"""Stream sources while training: windows of examples for datasets that are never encoded as a whole."""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import eq
from typing import Any

from sftx.config.options import Source
from sftx.data import sources as source_files
from sftx.data.ledger import Entry, Ledger
from sftx.data.row_encoder import EncodedRow, RowEncoder, check_rows
from sftx.data.sources import RowSources
from sftx.errors import DataError
from sftx.types import Example, Location, Record


@dataclass
class Stream:
    """Yields examples without end: each row comes from a source drawn by weight, and a source that ends begins again.

    Its position is data: another process that loads the `state_dict` reads the same rows from there on.
    """

    sources: Sequence[Source]
    encode: RowEncoder
    seed: int
    ledger: Ledger = field(default_factory=Ledger)
    formats: Counter[str] = field(default_factory=Counter)
    has_turns: bool = False
    """Whether any row was a conversation."""
    trains_stop: bool = False
    """Whether any example trained one of the template's stop tokens."""
    row_sources: RowSources = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._readers = [_Reader(source, self.row_sources, self.encode.config.encoding) for source in self.sources]
        self._weights = list(accumulate(source.weight for source in self.sources))
        self._num_drawn = 0
        self._next_group = 0
        self._window_start = self._state()

    @property
    def passes(self) -> list[int]:
        """Return how often each source was read to its end."""
        return [reader.passes for reader in self._readers]

    def window(self, size: int) -> list[Example]:
        """Read about `size` examples; groups are never split. Raises DataError when too many rows are dropped."""
        self._window_start = self._state()
        window: list[Example] = []
        passes = self.passes
        # A source smaller than a window is planned once per pass, not several times in one window.
        while not window or (len(window) < size and any(map(eq, passes, self.passes))):
            row = self._next_row()
            window += row.examples_from_group(self._next_group)
            self._next_group += row.num_groups
        check_rows(self, self.encode, window[0].row_id)
        return window

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values from which the last window is read again, or the first when none was read yet."""
        ledger = self._window_start["ledger"]
        entries = [entry.as_dict() for entry in self.ledger.entries[: ledger["num_entries"]]]
        return self._window_start | {"ledger": {"num_rows": ledger["num_rows"], "entries": entries}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position. Raises DataError when it was saved for other sources."""
        before, now = state["sources"], [source.path for source in self.sources]
        if before != now:
            raise DataError(
                f"data.train: the run that is resumed reads {', '.join(before)}, and this one {', '.join(now)}; give "
                "the same, or begin a new run"
            )
        self._readers = [
            _Reader(source, self.row_sources, self.encode.config.encoding, **values)
            for source, values in zip(self.sources, state["readers"], strict=True)
        ]
        self._num_drawn, self._next_group = state["num_drawn"], state["next_group"]
        self.has_turns, self.trains_stop = state["has_turns"], state["trains_stop"]
        # Changed in place: the run holds references to them.
        self.formats.clear()
        self.formats.update(state["formats"])
        self.ledger.num_rows = state["ledger"]["num_rows"]
        self.ledger.entries[:] = [Entry.of(entry) for entry in state["ledger"]["entries"]]
        self._window_start = self._state()

    def _state(self) -> dict[str, Any]:
        """Return the position, with only the length of the ledger, which only grows."""
        return {
            "sources": [source.path for source in self.sources],
            "num_drawn": self._num_drawn,
            "next_group": self._next_group,
            "readers": [reader.state_dict() for reader in self._readers],
            "formats": dict(self.formats),
            "has_turns": self.has_turns,
            "trains_stop": self.trains_stop,
            "ledger": {"num_rows": self.ledger.num_rows, "num_entries": len(self.ledger.entries)},
        }

    def _next_row(self) -> EncodedRow:
        """Encode the next row and count it; it may have no examples."""
        # The source is pure in the seed and the number of the draw, so that there is no other state. A hash takes 3 us:
        # as much as a generator's next number and a tenth of seeding one.
        key = f"stream {self.seed} {self._num_drawn}".encode()
        self._num_drawn += 1
        share = int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()) / 2**48
        reader = self._readers[bisect.bisect(self._weights, share * self._weights[-1])]
        where, record = reader.next()
        row = self.encode(where, record, reader.source)
        reader.note(row)
        if reader.passes == 0:  # a row is counted once
            self.ledger.num_rows += 1
            self.ledger.entries += row.entries
            self.formats[row.format] += 1
        self.has_turns = self.has_turns or row.has_turns
        self.trains_stop = self.trains_stop or self.encode.trains_stop(row)
        return row


@dataclass
class _Reader:
    """Reads one source again and again."""

    source: Source
    row_sources: RowSources
    encoding: str
    """The encoding of text files, unless the source names its own."""
    passes: int = 0
    num_read: int = 0
    """Rows read in the current pass."""
    is_used: bool = False
    """Whether a row of the current pass gave an example."""
    reason: str = ""
    """Reason of the last row that was dropped or changed."""
    _rows: Iterator[tuple[Location, Record]] | None = field(default=None, init=False)
    """The rest of the current pass; opened at `num_read` when it is None."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "num_read": self.num_read,
            "is_used": self.is_used,
            "reason": self.reason,
        }

    def next(self) -> tuple[Location, Record]:
        """Return the next record, and the first after the last. Raises DataError for a pass without an example."""
        if self._rows is None:
            self._rows = self._read(self.num_read)
        found = next(self._rows, None)
        if found is None:
            if not self.is_used:
                raise DataError(f"{self.source.path}: no row of it gives an example: {self.reason}")
            self.passes, self.num_read, self.is_used, self.reason = self.passes + 1, 0, False, ""
            self._rows = self._read()
            found = next(self._rows)
        self.num_read += 1
        return found

    def _read(self, start: int = 0) -> Iterator[tuple[Location, Record]]:
        return source_files.read(self.source, self.row_sources, encoding=self.encoding, streaming=True, start=start)

    def note(self, row: EncodedRow) -> None:
        """Note what came of the row that `next` returned."""
        self.is_used = self.is_used or bool(row.examples)
        if row.entries:
            self.reason = row.entries[0].reason
