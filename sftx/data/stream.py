"""Sources that are read while training become windows of examples: for sets that are never encoded as a whole."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sftx.config import Source
from sftx.data import sources
from sftx.data.ledger import Ledger
from sftx.data.rows import Row, RowEncoder, check_rows
from sftx.errors import DataError
from sftx.types import Example


@dataclass
class Stream:
    """Endless examples: each next row comes from a source drawn by weight; one that ends begins anew."""

    wanted: Sequence[Source]
    encode: RowEncoder
    seed: int
    ledger: Ledger = field(default_factory=Ledger)
    formats: Counter[str] = field(default_factory=Counter)
    has_turns: bool = False
    """Whether any row was a conversation."""
    trains_stop: bool = False
    """Whether any example trained one of the template's stop tokens."""
    passes: list[int] = field(init=False)
    """How often each source was read to its end."""

    def __post_init__(self) -> None:
        self.passes = [0] * len(self.wanted)

    def windows(self, size: int) -> Iterator[list[Example]]:
        """Lists of about `size` examples; groups are never parted. Raises DataError when too many rows are dropped."""
        window: list[Example] = []
        begun = list(self.passes)
        for row, first_group in self._rows():
            window += row.as_examples(first_group)
            # A set smaller than a window is planned once a pass, and not many times over.
            if len(window) >= size or all(now > then for now, then in zip(self.passes, begun, strict=True)):
                check_rows(self, self.encode, window[0].row_id)
                yield window
                window, begun = [], list(self.passes)

    def _rows(self) -> Iterator[tuple[Row, int]]:
        """The rows that give examples, with a number for the first group of each."""
        rng = random.Random(f"stream {self.seed}")
        readers = [self._endless(number, source) for number, source in enumerate(self.wanted)]
        weights = [source.weight for source in self.wanted]
        next_group = 0
        while True:
            (reader,) = rng.choices(readers, weights)
            row = next(reader)
            if row.examples:
                yield row, next_group
                next_group += len(row.examples)

    def _endless(self, number: int, source: Source) -> Iterator[Row]:
        while True:
            used, reason = False, ""
            for where, record in sources.read(source, streaming=True):
                row = self.encode(where, record, source)
                if self.passes[number] == 0:  # a row is accounted for once
                    self.ledger.num_rows += 1
                    self.ledger.entries += row.entries
                    self.formats[row.format] += 1
                used, reason = used or bool(row.examples), row.entries[0].reason if row.entries else reason
                self.has_turns = self.has_turns or row.has_turns
                self.trains_stop = self.trains_stop or self.encode.trains_stop(row)
                yield row
            if not used:
                raise DataError(f"{source.path}: no row of it gives an example: {reason}")
            self.passes[number] += 1
