"""Collate examples into one batch, padded or packed. This is the one place of the core where labels are shifted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sftx.types import IGNORE_INDEX, Attention, Batch, Example

if TYPE_CHECKING:
    from torch import Tensor


def pad(examples: Sequence[Example], *, multiple_of: int = 1) -> Batch:
    """Pad each example at the right to the longest, rounded up to `multiple_of` tokens.

    Padding is masked by length, never by an id. The batch's `extras` are empty: a collator that hands more to its
    loss adds it there.
    """
    import torch

    lengths = [len(example.token_ids) for example in examples]
    width = -(-max(lengths) // multiple_of) * multiple_of
    # The id of padding is never read: padding is masked by length, and some tokenizer's pad is another's eos.
    ids_BT = torch.zeros(len(examples), width, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
    is_weighted = any(example.weights is not None for example in examples)
    weights_BT = torch.ones(ids_BT.shape) if is_weighted else None
    for b, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids_T, labels_T, weights_T = _tensors(example)
        ids_BT[b, :length], labels_BT[b, :length] = ids_T, labels_T
        if weights_BT is not None:
            weights_BT[b, :length] = weights_T
    return Batch(
        input_ids_BT=ids_BT,
        labels_BT=labels_BT,
        position_ids_BT=torch.arange(width).expand(len(examples), width),
        lengths_B=torch.tensor(lengths),
        cu_seqlens=None,
        max_seqlen=max(lengths),
        row_ids=tuple(example.row_id for example in examples),
        num_label_tokens=int((labels_BT != IGNORE_INDEX).sum()),
        num_input_tokens=sum(lengths),
        token_weights_BT=weights_BT,
    )


def pack(examples: Sequence[Example], *, attention: Attention = "varlen") -> Batch:
    """Concatenate the examples into one row, [1, N], without padding; each is a document of its own.

    Position ids begin at 0 in each document; `attention` says how documents are kept from attending to one another.
    The batch's `extras` are empty, as those of `pad`.
    """
    import torch

    lengths = [len(example.token_ids) for example in examples]
    is_weighted = any(example.weights is not None for example in examples)
    ids, labels, weights = zip(*(_tensors(example) for example in examples), strict=True)
    labels_N = torch.cat(labels)
    return Batch(
        input_ids_BT=torch.cat(ids)[None],
        labels_BT=labels_N[None],
        position_ids_BT=torch.cat([torch.arange(length) for length in lengths])[None],
        lengths_B=None,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        row_ids=tuple(example.row_id for example in examples),
        num_label_tokens=int((labels_N != IGNORE_INDEX).sum()),
        num_input_tokens=sum(lengths),
        token_weights_BT=torch.cat(weights)[None] if is_weighted else None,
        attention=attention,
    )


def _tensors(example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [T] int64, shifted labels [T] int64 and the weight of each label [T] fp32.

    The label of a position is the next token where that is trained; the last position has none.
    """
    import torch

    ids_T = torch.tensor(example.token_ids, dtype=torch.int64)  # a copy: the columns may be read-only memory maps
    labels_T = torch.full_like(ids_T, IGNORE_INDEX)
    is_trained = torch.tensor(example.loss_mask[1:], dtype=torch.bool)
    labels_T[:-1] = ids_T[1:].masked_fill(~is_trained, IGNORE_INDEX)
    weights_T = torch.ones(len(ids_T))
    if example.weights is not None:
        weights_T[:-1] = torch.tensor(example.weights[1:])
    return ids_T, labels_T, weights_T


def groups_of(examples: Sequence[Example]) -> list[list[Example]]:
    """Return the examples of each group together, in order of first appearance: what no micro-batch boundary splits."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    return list(groups.values())
