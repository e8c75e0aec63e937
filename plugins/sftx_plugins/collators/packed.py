"""Examples become rows of several, without padding: documents that share a row and never see one another."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sftx import Attention, Batch, Collator, Example, Row, Step, Window, hookimpl, pack


@dataclass(frozen=True, eq=False)
class Packed:
    """Fills rows with whole examples (bfd), or cuts them into rows of one length (wrapped)."""

    length: Annotated[
        int | None, Field(ge=1, description="Tokens that a row holds; without it, as many as data.max_length.")
    ] = None
    strategy: Annotated[
        Literal["bfd", "wrapped"],
        Field(
            description="bfd: whole examples, the longest first, each where it leaves the least room; wrapped: the "
            "examples as one stream, cut into rows of `length` tokens (for plain text)."
        ),
    ] = "bfd"
    attention: Annotated[
        Attention,
        Field(
            description="How documents are kept apart. varlen: attention within their borders, and mask, with a "
            "printed line, where the model cannot; mask: transformers' own mask; mask4d: a block-diagonal mask."
        ),
    ] = "varlen"

    @hookimpl
    def sftx_collator(self, max_length: int) -> Collator:
        return PackedRows(self.length or max_length, self.strategy, self.attention)


@dataclass(frozen=True)
class PackedRows:
    """Rows of at most `length` tokens; an example that is longer has a row of its own."""

    length: int
    strategy: Literal["bfd", "wrapped"]
    attention: Attention

    @property
    def row_length(self) -> int:
        return self.length

    @property
    def wrap_length(self) -> int | None:
        return self.length if self.strategy == "wrapped" else None

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        """Full rows in a random order. Carried over are the emptiest rows, or the end of the stream when wrapped."""
        # Text seeds are hashed with SHA-512: unlike tuples of numbers they are the same in every process.
        rng = random.Random(f"packed {window.seed} {window.epoch} {window.index}")
        units = _units(window.groups)
        sizes = window.lengths if units is None else [sum(window.lengths[index] for index in unit) for unit in units]
        if self.strategy == "wrapped":
            filled, num_open = _wrap(sizes, self.length)
        else:
            filled, num_open = _best_fit_decreasing(sizes, self.length, rng), 0
        if units is None:
            rows = [tuple(row) for row in filled]
        else:
            rows = [tuple(itertools.chain.from_iterable(units[unit] for unit in row)) for row in filled]
        num_carried = 0 if window.is_last else num_open + (len(rows) - num_open) % window.rows_per_step
        rows, carried = rows[: len(rows) - num_carried], rows[len(rows) - num_carried :]
        rng.shuffle(rows)
        steps = [tuple(rows[at : at + window.rows_per_step]) for at in range(0, len(rows), window.rows_per_step)]
        return steps, tuple(index for row in carried for index in row)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """All rows of the micro-batch as one, [1, N]: there is no padding to be saved by several."""
        return pack(examples, attention=self.attention)


def _units(groups: Sequence[int]) -> list[Row] | None:
    """The examples of each group, which are never parted, in order of first appearance; None when each has its own."""
    if len(set(groups)) == len(groups):
        return None
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return [tuple(indices) for indices in members.values()]


def _best_fit_decreasing(sizes: Sequence[int], length: int, rng: random.Random) -> list[list[int]]:
    """Units put into rows, the longest first, each into the row that it leaves the least room in; full rows first.

    Best-fit-decreasing (Johnson et al. 1974): at most 11/9 of the fewest rows possible, and one. Units of one size are
    taken in a random order, so that each epoch packs anew. Rows wait in stacks by the room that they have left, and the
    stacks that are not empty are the bits of one integer: the tightest row that fits is the lowest bit from the size
    on. As a row stays the tightest while the same size fits it, all of a stack is filled at a time.
    """
    of_size: defaultdict[int, list[int]] = defaultdict(list)
    for unit, size in enumerate(sizes):
        of_size[size].append(unit)
    rows_with_room: defaultdict[int, list[list[int]]] = defaultdict(list)
    rooms = 0
    for size in sorted(of_size, reverse=True):
        waiting = of_size[size]
        rng.shuffle(waiting)
        at = 0
        while at < len(waiting):
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else max(length, size)
            each = room // size
            num_rows = -(-(len(waiting) - at) // each)
            stack = rows_with_room[room] if fitting else [[] for _ in range(num_rows)]
            for _ in range(min(num_rows, len(stack))):
                row, put = stack.pop(), waiting[at : at + each]
                row += put
                at += each
                left = room - size * len(put)
                rows_with_room[left].append(row)
                rooms |= 1 << left
            if fitting and not stack:
                rooms &= ~(1 << room)
    return [row for room in sorted(rows_with_room) for row in rows_with_room[room]]


def _wrap(sizes: Sequence[int], length: int) -> tuple[list[list[int]], int]:
    """Neighbours put together until they fill a row, and how many rows at the end are still open: 0 or 1."""
    rows: list[list[int]] = []
    row: list[int] = []
    filled = 0
    for unit, size in enumerate(sizes):
        if row and filled + size > length:
            rows.append(row)
            row, filled = [], 0
        row.append(unit)
        filled += size
        if filled >= length:
            rows.append(row)
            row, filled = [], 0
    return ([*rows, row], 1) if row else (rows, 0)
