"""Packs examples into rows without padding. Each example is a document that attends to itself alone."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sftx import Attention, Batch, Collator, ConfigError, Example, Row, Step, Window, hookimpl, pack


@dataclass(frozen=True, eq=False)
class Packed:
    """Fills rows with whole examples (bfd), or cuts the stream of examples into rows of one length (wrapped)."""

    length: Annotated[
        int | None, Field(ge=1, le=2**24, description="Tokens that a row holds; by default data.max_length.")
    ] = None
    strategy: Annotated[
        Literal["bfd", "wrapped"],
        Field(
            description="bfd (best-fit-decreasing): whole examples, the longest first, each put into the row where it "
            "leaves the least room; wrapped: one stream of examples, cut into rows of `length` tokens (for plain text)."
        ),
    ] = "bfd"
    attention: Annotated[
        Attention,
        Field(
            description="How documents are kept apart. varlen: attention within document boundaries (a model that "
            "cannot do that uses mask, and a line says so); mask: transformers' mask; mask4d: a block-diagonal mask."
        ),
    ] = "varlen"
    share_prefixes: Annotated[
        bool,
        Field(
            description="Compute the tokens that the examples of one record begin with once (the prompt of several "
            "answers). A loss that compares answers asks for it by itself."
        ),
    ] = False

    @hookimpl
    def sftx_collator(self, max_length: int) -> Collator:
        if self.share_prefixes and self.attention == "mask":
            raise ConfigError("share_prefixes: transformers' mask keeps an answer from its prompt; leave attention out")
        return PackedRows(self.length or max_length, self.strategy, self.attention, self.share_prefixes)


@dataclass(frozen=True)
class PackedRows:
    """Plans rows of at most `length` tokens. A longer example gets a row of its own."""

    length: int
    strategy: Literal["bfd", "wrapped"]
    attention: Attention
    share_prefixes: bool = False

    def sharing(self, shared: bool) -> PackedRows | None:
        """Return the collator that shares the prefixes of a group, or that does not; None where it cannot."""
        if shared and (self.attention == "mask" or self.strategy == "wrapped"):
            return None
        return dataclasses.replace(self, share_prefixes=shared)

    @property
    def row_length(self) -> int:
        return self.length

    @property
    def wrap_length(self) -> int | None:
        return self.length if self.strategy == "wrapped" else None

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        """Return the rows in a random order. Carried over are the emptiest rows, or the end of a wrapped stream."""
        # A seed that is text is hashed with SHA-512, so it is the same in every process, unlike a tuple's hash.
        rng = random.Random(f"packed {window.seed} {window.epoch} {window.index}")
        groups = _groups(window.groups)
        sizes = window.lengths if groups is None else [sum(window.lengths[i] for i in group) for group in groups]
        if self.strategy == "wrapped":
            packed, num_open = _wrap(sizes, self.length)
        else:
            packed, num_open = _best_fit_decreasing(sizes, self.length, rng), 0
        if groups is None:
            rows = [tuple(row) for row in packed]
        else:
            rows = [tuple(itertools.chain.from_iterable(groups[number] for number in row)) for row in packed]
        num_carried = 0 if window.is_last else num_open + (len(rows) - num_open) % window.rows_per_step
        rows, carried = rows[: len(rows) - num_carried], rows[len(rows) - num_carried :]
        rng.shuffle(rows)
        steps = [tuple(rows[at : at + window.rows_per_step]) for at in range(0, len(rows), window.rows_per_step)]
        return steps, tuple(index for row in carried for index in row)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return all rows of the micro-batch as one, [1, N]; without padding, several rows would gain nothing."""
        return pack(examples, attention=self.attention, share_prefixes=self.share_prefixes)


def _groups(groups: Sequence[int]) -> list[Row] | None:
    """Return the examples of each group, which stay together; None if each example is a group of its own."""
    if len(set(groups)) == len(groups):
        return None
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return [tuple(indices) for indices in members.values()]


def _best_fit_decreasing(sizes: Sequence[int], length: int, rng: random.Random) -> list[list[int]]:
    """Pack items of these sizes into rows, the largest first, each into the row where it leaves the least room.

    Returns the items of each row, full rows first. Best-fit-decreasing (Johnson et al. 1974) needs at most 11/9 of the
    fewest rows possible, and one. Items of one size are taken in a random order, so that each epoch packs differently.
    Rows are kept in stacks by the room left in them, and the bits of one integer mark the stacks that are not empty:
    the tightest row that fits a size is the lowest set bit from that size on. A row stays the tightest while the same
    size fits it, so a whole stack is filled at a time.
    """
    items_of_size: defaultdict[int, list[int]] = defaultdict(list)
    for item, size in enumerate(sizes):
        items_of_size[size].append(item)
    rows_with_room: defaultdict[int, list[list[int]]] = defaultdict(list)
    rooms = 0  # bit r is set if rows_with_room[r] is not empty
    for size in sorted(items_of_size, reverse=True):
        items = items_of_size[size]
        rng.shuffle(items)
        at = 0
        while at < len(items):
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else max(length, size)
            per_row = room // size
            num_rows = -(-(len(items) - at) // per_row)
            stack = rows_with_room[room] if fitting else [[] for _ in range(num_rows)]
            for _ in range(min(num_rows, len(stack))):
                row, added = stack.pop(), items[at : at + per_row]
                row += added
                at += per_row
                left = room - size * len(added)
                rows_with_room[left].append(row)
                rooms |= 1 << left
            if fitting and not stack:
                rooms &= ~(1 << room)
    return [row for room in sorted(rows_with_room) for row in rows_with_room[room]]


def _wrap(sizes: Sequence[int], length: int) -> tuple[list[list[int]], int]:
    """Return rows of consecutive items, and the number of rows at the end that are not full: 0 or 1."""
    rows: list[list[int]] = []
    row: list[int] = []
    filled = 0
    for item, size in enumerate(sizes):
        if row and filled + size > length:
            rows.append(row)
            row, filled = [], 0
        row.append(item)
        filled += size
        if filled >= length:
            rows.append(row)
            row, filled = [], 0
    return ([*rows, row], 1) if row else (rows, 0)
