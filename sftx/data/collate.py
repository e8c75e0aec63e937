"""Examples become groups, and one batch, padded or packed. The one place of the core where labels are shifted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sftx.types import IGNORE_INDEX, Attention, Batch, Example

if TYPE_CHECKING:
    from torch import Tensor


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
    weights_BT = torch.ones(ids_BT.shape) if _weighted(examples) else None
    for b, example in enumerate(examples):
        num = len(example.token_ids)
        ids_BT[b, :num] = torch.tensor(example.token_ids)
        labels_BT[b, :num] = _labels(example)
        if weights_BT is not None:
            weights_BT[b, :num] = _weights(example)
    return Batch(
        input_ids_BT=ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=torch.arange(length).expand(len(examples), length),
        lengths_B=torch.tensor([len(example.token_ids) for example in examples]),
        cu_seqlens=None,
        max_seqlen=longest,
        row_ids=tuple(example.row_id for example in examples),
        num_label_tokens=sum(example.num_label_tokens for example in examples),
        num_input_tokens=sum(len(example.token_ids) for example in examples),
        token_weights_BT=weights_BT,
    )


def pack(examples: Sequence[Example], *, attention: Attention = "varlen") -> Batch:
    """One row, [1, N]: the examples one after the other, without padding, each a document of its own.

    Position ids begin at 0 in each document; `attention` is how none sees another. The batch's `extras` are empty, as
    those of `pad`.
    """
    import torch

    lengths = [len(example.token_ids) for example in examples]
    return Batch(
        input_ids_BT=torch.tensor([[token for example in examples for token in example.token_ids]]),
        labels_BT=torch.cat([_labels(example) for example in examples])[None],
        position_ids_BT=torch.cat([torch.arange(length) for length in lengths])[None],
        lengths_B=None,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        row_ids=tuple(example.row_id for example in examples),
        num_label_tokens=sum(example.num_label_tokens for example in examples),
        num_input_tokens=sum(lengths),
        token_weights_BT=torch.cat([_weights(example) for example in examples])[None] if _weighted(examples) else None,
        attention=attention,
    )


def _labels(example: Example) -> Tensor:
    """[T], int64: after each token the next one, where that is trained; nothing after the last."""
    import torch

    labels_T = torch.full((len(example.token_ids),), IGNORE_INDEX)
    trained_T = torch.tensor(example.loss_mask[1:], dtype=torch.bool)
    labels_T[:-1] = torch.tensor(example.token_ids[1:], dtype=torch.int64).masked_fill(~trained_T, IGNORE_INDEX)
    return labels_T


def _weights(example: Example) -> Tensor:
    """[T], fp32: the weight of each label."""
    import torch

    weights_T = torch.ones(len(example.token_ids))
    if example.weights is not None:
        weights_T[:-1] = torch.tensor(example.weights[1:])
    return weights_T


def _weighted(examples: Sequence[Example]) -> bool:
    return any(example.weights is not None for example in examples)


def groups_of(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each group together, in order: what is never parted between micro-batches."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    return list(groups.values())
