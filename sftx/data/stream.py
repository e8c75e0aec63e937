"""Sources that are read while training become windows of examples: for sets that are never encoded as a whole."""

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
from sftx.data import sources
from sftx.data.ledger import Entry, Ledger
from sftx.data.row_encoder import Row, RowEncoder, check_rows
from sftx.errors import DataError
from sftx.types import Example, Location, Record


@dataclass
class Stream:
    """Endless examples: each next row comes from a source drawn by weight; one that ends begins anew.

    Where it stands is data: another process that is given the `state_dict` reads the same rows from there on.
    """

    wanted: Sequence[Source]
    encode: RowEncoder
    seed: int
    ledger: Ledger = field(default_factory=Ledger)
    formats: Counter[str] = field(default_factory=Counter)
    has_turns: bool = False
    """Whether any row was a conversation."""
    trains_stop: bool = False
    """Whether any example trained one of the template's stop tokens."""

    def __post_init__(self) -> None:
        self._readers = [_Reader(source) for source in self.wanted]
        self._weights = list(accumulate(source.weight for source in self.wanted))
        self._num_drawn = 0
        self._next_group = 0
        self._begun = self._state()

    @property
    def passes(self) -> list[int]:
        """How often each source was read to its end."""
        return [reader.passes for reader in self._readers]

    def window(self, size: int) -> list[Example]:
        """The next examples, about `size`; groups are never parted. Raises DataError when too many rows are dropped."""
        self._begun = self._state()
        window: list[Example] = []
        begun = self.passes
        # A set smaller than a window is planned once a pass, and not many times over.
        while not window or (len(window) < size and any(map(eq, begun, self.passes))):
            row = self._row()
            window += row.as_examples(self._next_group)
            self._next_group += len(row.examples)
        check_rows(self, self.encode, window[0].row_id)
        return window

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which the last window is read again, or the first when none was read yet."""
        num_entries = self._begun["ledger"]["num_entries"]
        entries = [entry.as_dict() for entry in self.ledger.entries[:num_entries]]
        return self._begun | {"ledger": {"num_rows": self._begun["ledger"]["num_rows"], "entries": entries}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. Raises DataError when it is a state of other sources."""
        before, now = state["sources"], [source.path for source in self.wanted]
        if before != now:
            raise DataError(
                f"data.train: the run that is resumed reads {', '.join(before)}, and this one {', '.join(now)}; give "
                "the same, or begin a new run"
            )
        self._readers = [
            _Reader(source, **values) for source, values in zip(self.wanted, state["readers"], strict=True)
        ]
        self._num_drawn, self._next_group = state["num_drawn"], state["next_group"]
        self.has_turns, self.trains_stop = state["has_turns"], state["trains_stop"]
        # In place: they are the run's own account of its rows.
        self.formats.clear()
        self.formats.update(state["formats"])
        self.ledger.num_rows = state["ledger"]["num_rows"]
        self.ledger.entries[:] = [Entry.of(entry) for entry in state["ledger"]["entries"]]
        self._begun = self._state()

    def _state(self) -> dict[str, Any]:
        """Where it stands, and of the ledger, which only grows, how long it is."""
        return {
            "sources": [source.path for source in self.wanted],
            "num_drawn": self._num_drawn,
            "next_group": self._next_group,
            "readers": [reader.state_dict() for reader in self._readers],
            "formats": dict(self.formats),
            "has_turns": self.has_turns,
            "trains_stop": self.trains_stop,
            "ledger": {"num_rows": self.ledger.num_rows, "num_entries": len(self.ledger.entries)},
        }

    def _row(self) -> Row:
        """The next row, accounted for; it may give no examples."""
        reader = self._readers[self._draw()]
        where, record = reader.next()
        row = self.encode(where, record, reader.source)
        reader.note(row)
        if reader.passes == 0:  # a row is accounted for once
            self.ledger.num_rows += 1
            self.ledger.entries += row.entries
            self.formats[row.format] += 1
        self.has_turns = self.has_turns or row.has_turns
        self.trains_stop = self.trains_stop or self.encode.trains_stop(row)
        return row

    def _draw(self) -> int:
        """The number of the next source: pure in the seed and the number of the draw, so that there is no other state.

        By a hash: 3 us, as a generator's next number and a tenth of seeding one.
        """
        key = f"stream {self.seed} {self._num_drawn}".encode()
        self._num_drawn += 1
        share = int.from_bytes(hashlib.blake2b(key, digest_size=6).digest()) / 2**48
        return bisect.bisect(self._weights, share * self._weights[-1])


@dataclass
class _Reader:
    """One source, read again and again."""

    source: Source
    passes: int = 0
    num_read: int = 0
    """Rows of the present pass."""
    is_used: bool = False
    """Whether a row of the present pass gave an example."""
    reason: str = ""
    """Why the last one that was dropped or changed was."""
    _rows: Iterator[tuple[Location, Record]] | None = field(default=None, init=False)
    """What is left of the present pass; made from the above where there is none."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "num_read": self.num_read,
            "is_used": self.is_used,
            "reason": self.reason,
        }

    def next(self) -> tuple[Location, Record]:
        """The next record; after the last, the first. Raises DataError when no row of a pass gave an example."""
        if self._rows is None:
            self._rows = sources.read(self.source, streaming=True, start=self.num_read)
        found = next(self._rows, None)
        if found is None:
            if not self.is_used:
                raise DataError(f"{self.source.path}: no row of it gives an example: {self.reason}")
            self.passes, self.num_read, self.is_used, self.reason = self.passes + 1, 0, False, ""
            self._rows = sources.read(self.source, streaming=True)
            found = next(self._rows)
        self.num_read += 1
        return found

    def note(self, row: Row) -> None:
        """Notes what became of the row that `next` gave."""
        self.is_used = self.is_used or bool(row.examples)
        if row.entries:
            self.reason = row.entries[0].reason
