"""Numbers that belong to the examples of a split, as batches get them.

Dimensions: E examples of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sftx.errors import PluginError
from sftx.types import Batch, Example


@dataclass(frozen=True)
class Values:
    """The values of every example of a split: by name, [examples] in the order of the split."""

    by_name: Mapping[str, NDArray[np.float32]]

    def add_to(self, batch: Batch, indices: Sequence[int], examples: Sequence[Example]) -> Batch:
        """Return the batch with the values of its examples among its extras, each [E], in the order of `row_ids`.

        `examples` are those that the batch was collated of, and `indices` their places in the split.
        """
        at = np.asarray(indices)[places_of(batch, examples)]
        if taken := self.by_name.keys() & batch.extras.keys():
            raise PluginError(f"precompute has the name {min(taken)!r}, which batch.extras has already; choose another")
        values = {name: torch.from_numpy(column[at]) for name, column in self.by_name.items()}
        return dataclasses.replace(batch, extras={**batch.extras, **values})


def places_of(batch: Batch, examples: Sequence[Example]) -> list[int]:
    """Return the place of each of the batch's examples among those that it was collated of.

    A collator may have copied them; a copy is found by its row id.
    """
    by_object = {id(example): place for place, example in enumerate(examples)}
    places = [by_object.get(id(example)) for example in batch.examples]
    copied: dict[str, list[int]] = {}
    for place in sorted(set(range(len(examples))) - set(places), reverse=True):
        copied.setdefault(examples[place].row_id, []).append(place)
    return [
        copied[example.row_id].pop() if place is None else place
        for place, example in zip(places, batch.examples, strict=True)
    ]
