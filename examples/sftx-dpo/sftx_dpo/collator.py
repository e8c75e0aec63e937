"""Batches preference pairs: both sides of a pair share a micro-batch, whose extras say which row is which side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from sftx import Batch, DataError, Example, Row, Step, Window, pad

from sftx_dpo.parser import CHOSEN, REJECTED, SIDE

CHOSEN_P: Final = "dpo_chosen_P"
REJECTED_P: Final = "dpo_rejected_P"
"""Keys of a batch's extras: the rows of the chosen and of the rejected answers of its P pairs; int64."""


class PairCollator:
    """Plans pairs as rows, so that `per_device_train_batch_size` counts pairs, and pads at the right."""

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        """Return the pairs in a random order, the longest of a step first, so that neighbours need little padding."""
        members: dict[int, list[int]] = {}
        for index, group in enumerate(window.groups):
            members.setdefault(group, []).append(index)
        pairs = [tuple(indices) for indices in members.values()]
        # A seed that is text is hashed with SHA-512, so it is the same in every process, unlike a tuple's hash.
        random.Random(f"dpo {window.seed} {window.epoch} {window.index}").shuffle(pairs)
        num_carried = 0 if window.is_last else len(pairs) % window.rows_per_step
        planned = pairs[: len(pairs) - num_carried]
        steps = [
            tuple(
                sorted(planned[at : at + window.rows_per_step], key=lambda pair: -max(window.lengths[i] for i in pair))
            )
            for at in range(0, len(planned), window.rows_per_step)
        ]
        return steps, tuple(index for pair in pairs[len(planned) :] for index in pair)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return a padded batch with the rows of each pair in its extras. Raises DataError for a row without a pair."""
        import torch

        sides: dict[int, dict[object, int]] = {}
        for row, example in enumerate(examples):
            sides.setdefault(example.group, {}).setdefault(example.extras.get(SIDE), row)
        for group, rows in sides.items():
            members = [example.row_id for example in examples if example.group == group]
            if set(rows) != {CHOSEN, REJECTED} or len(members) != 2:
                raise DataError(
                    f"{members[0]}: is not a preference pair, and dpo trains on nothing else; give it records with "
                    "conversations, chosen and rejected"
                )
        batch = pad(examples)
        for name, side in ((CHOSEN_P, CHOSEN), (REJECTED_P, REJECTED)):
            batch.extras[name] = torch.tensor([rows[side] for rows in sides.values()])
        return batch
