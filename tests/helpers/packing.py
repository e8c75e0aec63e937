"""A collator that packs, for the tests of what must hold for packed batches as for padded ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sftx import Batch, Example, pad
from sftx_plugins.padded import Padded


class Packed(Padded):
    """All examples of a micro-batch in one row, one after the other."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        alone = [pad([example]) for example in examples]
        weights = [torch.ones(b.labels_BT.shape) if b.token_weights_BT is None else b.token_weights_BT for b in alone]
        lengths = [batch.max_seqlen for batch in alone]
        return Batch(
            input_ids_BT=torch.cat([batch.input_ids_BT for batch in alone], 1),
            labels_BT=torch.cat([batch.labels_BT for batch in alone], 1),
            position_ids_BT=torch.cat([batch.position_ids_BT for batch in alone], 1),
            lengths_B=None,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
            max_seqlen=max(lengths),
            row_ids=tuple(example.row_id for example in examples),
            num_tokens=sum(example.num_tokens for example in examples),
            num_real_tokens=sum(lengths),
            token_weights_BT=torch.cat(weights, 1),
        )
