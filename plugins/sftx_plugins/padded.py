"""Examples become rows of one length, padded at the right and masked by length."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import IGNORE_INDEX, Batch, Collator, Example, Row, Step, hookimpl

# As many steps are sorted by length together as in transformers' group_by_length: long enough to find rows of
# similar length, short enough that an epoch does not run from short to long.
_STEPS_SORTED = 50


@dataclass(frozen=True, eq=False)
class Padded:
    """Pads each micro-batch to its longest row."""

    group_by_length: Annotated[bool, Field(description="Let rows of similar length share a step.")] = True
    pad_to_multiple_of: Annotated[int, Field(ge=1, description="Round the length of a batch up to this.")] = 1

    @hookimpl
    def sftx_collator(self) -> Collator:
        return self

    def plan(
        self,
        lengths: Sequence[int],
        groups: Sequence[int],
        *,
        seed: int,
        epoch: int,
        window: int,
        examples_per_step: int,
        final: bool,
    ) -> tuple[list[Step], Row]:
        """A random order of the rows; with `group_by_length`, sorted by length within stretches of 50 steps."""
        rows = _rows(groups)
        # Text seeds are hashed with SHA-512: unlike tuples of numbers they are the same in every process.
        rng = random.Random(f"padded {seed} {epoch} {window}")
        rng.shuffle(rows)
        num_carried = 0 if final else len(rows) % examples_per_step
        rows, carried = rows[: len(rows) - num_carried], rows[len(rows) - num_carried :]
        if self.group_by_length:
            stretch = examples_per_step * _STEPS_SORTED
            for start in range(0, len(rows), stretch):
                rows[start : start + stretch] = sorted(
                    rows[start : start + stretch], key=lambda row: max(lengths[i] for i in row), reverse=True
                )
        steps = [tuple(rows[at : at + examples_per_step]) for at in range(0, len(rows), examples_per_step)]
        if self.group_by_length:
            rng.shuffle(steps)
        return steps, tuple(index for row in carried for index in row)

    def collate(self, examples: Sequence[Example]) -> Batch:
        import torch

        longest = max(len(example.token_ids) for example in examples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        # The id under the padding is never seen: it is masked by length, and some tokenizer's pad is another's eos.
        ids_BT = torch.zeros(len(examples), length, dtype=torch.int64)
        labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
        weights_BT = torch.ones(ids_BT.shape) if any(e.weights is not None for e in examples) else None
        for b, example in enumerate(examples):
            num = len(example.token_ids)
            ids_B = torch.tensor(example.token_ids)
            ids_BT[b, :num] = ids_B
            trained_T = torch.tensor(example.loss_mask[1:], dtype=torch.bool)
            labels_BT[b, : num - 1] = ids_B[1:].masked_fill(~trained_T, IGNORE_INDEX)
            if weights_BT is not None and example.weights is not None:
                weights_BT[b, : num - 1] = torch.tensor(example.weights[1:])
        return Batch(
            input_ids_BT=ids_BT,
            labels_BT=labels_BT,
            position_ids_BT=torch.arange(length).expand(len(examples), length),
            lengths_B=torch.tensor([len(example.token_ids) for example in examples]),
            cu_seqlens=None,
            max_seqlen=longest,
            row_ids=tuple(example.row_id for example in examples),
            num_tokens=sum(example.num_tokens for example in examples),
            num_real_tokens=sum(len(example.token_ids) for example in examples),
            token_weights_BT=weights_BT,
        )


def _rows(groups: Sequence[int]) -> list[Row]:
    """The examples of each group, as one row; in order of first appearance."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return [tuple(indices) for indices in members.values()]
