"""Examples become rows of one length, padded at the right and masked by length, or one row without padding."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Batch, Collator, ConfigError, Example, Row, Step, Window, hookimpl, pack, pad

# As many steps are sorted by length together as in transformers' group_by_length: long enough to find rows of
# similar length, short enough that an epoch does not run from short to long.
_STEPS_SORTED = 50


@dataclass(frozen=True, eq=False)
class Padded:
    """Pads each micro-batch to its longest row."""

    group_by_length: Annotated[bool, Field(description="Let rows of similar length share a step.")] = True
    pad_to_multiple_of: Annotated[int, Field(ge=1, description="Round the length of a batch up to this.")] = 1
    padding_free: Annotated[
        bool, Field(description="Compute no padding: the rows of a micro-batch one after the other, as if packed.")
    ] = False

    @hookimpl
    def sftx_collator(self) -> Collator:
        if self.padding_free and self.pad_to_multiple_of > 1:
            raise ConfigError("padding_free pads nothing; leave pad_to_multiple_of out")
        return self

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        """A random order of the rows; with `group_by_length`, sorted by length within stretches of 50 steps."""
        rows = _rows(window.groups)
        # Text seeds are hashed with SHA-512: unlike tuples of numbers they are the same in every process.
        rng = random.Random(f"padded {window.seed} {window.epoch} {window.index}")
        rng.shuffle(rows)
        num_carried = 0 if window.is_last else len(rows) % window.rows_per_step
        rows, carried = rows[: len(rows) - num_carried], rows[len(rows) - num_carried :]
        if self.group_by_length:
            stretch = window.rows_per_step * _STEPS_SORTED
            for start in range(0, len(rows), stretch):
                rows[start : start + stretch] = sorted(
                    rows[start : start + stretch], key=lambda row: max(window.lengths[i] for i in row), reverse=True
                )
        steps = [tuple(rows[at : at + window.rows_per_step]) for at in range(0, len(rows), window.rows_per_step)]
        if self.group_by_length:
            rng.shuffle(steps)
        return steps, tuple(index for row in carried for index in row)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return pack(examples) if self.padding_free else pad(examples, multiple_of=self.pad_to_multiple_of)


def _rows(groups: Sequence[int]) -> list[Row]:
    """The examples of each group, as one row; in order of first appearance."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return [tuple(indices) for indices in members.values()]
