"""Pads the rows of a micro-batch to one length, at the right, or concatenates them without padding."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Batch, Collator, ConfigError, Example, Row, Step, Window, hookimpl, pack, pad

# Steps whose rows are sorted by length together, as many as in transformers' group_by_length: enough to find rows of
# similar length, and few enough that an epoch does not run from long to short rows.
_STEPS_SORTED = 50


@dataclass(frozen=True, eq=False)
class Padded:
    """Pads each micro-batch to its longest row."""

    group_by_length: Annotated[bool, Field(description="Let rows of similar length share a step.")] = True
    pad_to_multiple_of: Annotated[
        int, Field(ge=1, le=2**24, description="Round the row length up to a multiple of this.")
    ] = 1
    padding_free: Annotated[
        bool, Field(description="Concatenate the rows of a micro-batch, as if packed, so that no padding is computed.")
    ] = False
    share_prefixes: Annotated[
        bool,
        Field(
            description="With padding_free, compute the tokens that the examples of one record begin with once (the "
            "prompt of several answers). A loss that compares answers asks for it by itself."
        ),
    ] = False

    @hookimpl
    def sftx_collator(self) -> Collator:
        if self.share_prefixes and not self.padding_free:
            raise ConfigError("share_prefixes: padded rows share nothing; set padding_free too")
        if self.padding_free and self.pad_to_multiple_of > 1:
            raise ConfigError("padding_free pads nothing; leave pad_to_multiple_of out")
        return self

    def sharing(self, shared: bool) -> Padded | None:
        """Return the collator that shares the prefixes of a group, or that does not; None where it cannot."""
        return dataclasses.replace(self, share_prefixes=shared) if self.padding_free or not shared else None

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        """Return the rows in a random order; with `group_by_length`, sorted by length within chunks of 50 steps."""
        members: defaultdict[int, list[int]] = defaultdict(list)
        for index, group in enumerate(window.groups):
            members[group].append(index)
        rows: list[Row] = [tuple(indices) for indices in members.values()]
        # A seed that is text is hashed with SHA-512, so it is the same in every process, unlike a tuple's hash.
        rng = random.Random(f"padded {window.seed} {window.epoch} {window.index}")
        rng.shuffle(rows)
        num_carried = 0 if window.is_last else len(rows) % window.rows_per_step
        rows, carried = rows[: len(rows) - num_carried], rows[len(rows) - num_carried :]
        if self.group_by_length:
            size = window.rows_per_step * _STEPS_SORTED
            for start in range(0, len(rows), size):
                rows[start : start + size] = sorted(
                    rows[start : start + size], key=lambda row: max(window.lengths[i] for i in row), reverse=True
                )
        steps = [tuple(rows[at : at + window.rows_per_step]) for at in range(0, len(rows), window.rows_per_step)]
        if self.group_by_length:
            rng.shuffle(steps)
        return steps, tuple(index for row in carried for index in row)

    def collate(self, examples: Sequence[Example]) -> Batch:
        if self.padding_free:
            return pack(examples, share_prefixes=self.share_prefixes)
        return pad(examples, multiple_of=self.pad_to_multiple_of)
