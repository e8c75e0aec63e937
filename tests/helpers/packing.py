"""A collator that packs, for tests that must hold for packed batches as for padded ones."""

from __future__ import annotations

from collections.abc import Sequence

from sftx import Batch, Example, pack
from sftx_plugins.collators.padded import Padded


class Packed(Padded):
    """Packs all examples of a micro-batch into one row."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        return pack(examples)
