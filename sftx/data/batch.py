"""Examples become groups, and one padded batch. The one place of the core where labels are shifted."""

from __future__ import annotations

from collections.abc import Sequence

from sftx.types import IGNORE_INDEX, Batch, Example


def pad(examples: Sequence[Example], *, multiple_of: int = 1) -> Batch:
    """Rows of the examples, padded at the right to the longest, rounded up to `multiple_of` tokens.

    Padding is masked by length, never by an id. The batch's `extras` are empty: a collator that hands more to its
    loss adds it there.
    """
    import torch

    longest = max(len(example.token_ids) for example in examples)
    length = -(-longest // multiple_of) * multiple_of
    # The id under the padding is never seen: it is masked by length, and some tokenizer's pad is another's eos.
    ids_BT = torch.zeros(len(examples), length, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
    weights_BT = torch.ones(ids_BT.shape) if any(e.weights is not None for e in examples) else None
    for b, example in enumerate(examples):
        num = len(example.token_ids)
        ids_T = torch.tensor(example.token_ids)
        ids_BT[b, :num] = ids_T
        trained_T = torch.tensor(example.loss_mask[1:], dtype=torch.bool)
        labels_BT[b, : num - 1] = ids_T[1:].masked_fill(~trained_T, IGNORE_INDEX)
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


def groups_of(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each group together, in order: what is never parted between micro-batches."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    return list(groups.values())
