"""A collator that packs, for the tests of what must hold for packed batches as for padded ones."""

from __future__ import annotations

from collections.abc import Sequence

from sftx import Batch, Example, pack
from sftx_plugins.collators.padded import Padded


class Packed(Padded):
    """All examples of a micro-batch in one row, one after the other."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        return pack(examples)
