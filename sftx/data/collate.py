"""Collate examples into one batch, padded or packed. This is the one place of the core where labels are shifted.

`per_label` and `sum_by_example` go from examples to the positions of a batch and back, whatever its layout.
Dimensions: B rows, T tokens, N = B*T, E examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sftx.errors import PluginError
from sftx.types import IGNORE_INDEX, Attention, Batch, Example, SharedPrefixes

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
        num_label_tokens=sum(example.num_label_tokens for example in examples),
        num_input_tokens=sum(lengths),
        token_weights_BT=weights_BT,
        examples=tuple(examples),
    )


def pack(examples: Sequence[Example], *, attention: Attention = "varlen", share_prefixes: bool = False) -> Batch:
    """Concatenate the examples into one row, [1, N], without padding; each is a document of its own.

    Position ids begin at 0 in each document; `attention` says how documents are kept from attending to one another.
    With `share_prefixes`, the tokens that neighbouring examples of one group begin with, and none of which is trained,
    stand in the row once (see `SharedPrefixes`). The batch's `extras` are empty, as those of `pad`.
    """
    import torch

    if share_prefixes and (batch := _pack_shared(examples, attention)) is not None:
        return batch
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
        num_label_tokens=sum(example.num_label_tokens for example in examples),
        num_input_tokens=sum(lengths),
        token_weights_BT=torch.cat(weights)[None] if is_weighted else None,
        attention=attention,
        examples=tuple(examples),
    )


def _pack_shared(examples: Sequence[Example], attention: Attention) -> Batch | None:
    """Return the row of these examples with their prefixes shared; None where none has one in common."""
    import torch

    spans: list[tuple[int, int, int]] = []
    """The example, and the begin and end of its tokens, of each piece."""
    prefixes: list[int] = []
    own: list[int] = []
    number = 0
    for _, members in itertools.groupby(examples, key=lambda example: example.group):
        group = list(members)
        num_shared, prefix = common_prefix(group), -1
        if num_shared:
            prefix = len(spans)
            spans.append((number, 0, num_shared))
            prefixes.append(-1)
        for example in group:
            own.append(len(spans))
            spans.append((number, num_shared, len(example.token_ids)))
            prefixes.append(prefix)
            number += 1
    if len(spans) == len(examples):
        return None
    tensors = [_tensors(example) for example in examples]

    def joined(which: int) -> Tensor:
        return torch.cat([tensors[example][which][begin:end] for example, begin, end in spans])[None]

    lengths = [end - begin for _, begin, end in spans]
    borders = [0, *itertools.accumulate(lengths)]
    keys = [
        [*([range(borders[prefix], borders[prefix + 1])] if prefix >= 0 else []), range(*borders[piece : piece + 2])]
        for piece, prefix in enumerate(prefixes)
    ]
    num_keys = [sum(map(len, ranges)) for ranges in keys]
    labels_BT = joined(1)
    is_weighted = any(example.weights is not None for example in examples)
    return Batch(
        input_ids_BT=joined(0),
        labels_BT=labels_BT,
        position_ids_BT=torch.cat([torch.arange(begin, end) for _, begin, end in spans])[None],
        lengths_B=None,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(lengths),
        row_ids=tuple(example.row_id for example in examples),
        num_label_tokens=int((labels_BT != IGNORE_INDEX).sum()),
        num_input_tokens=sum(len(example.token_ids) for example in examples),
        token_weights_BT=joined(2) if is_weighted else None,
        attention=attention,
        examples=tuple(examples),
        shared=SharedPrefixes(
            prefix_P=torch.tensor(prefixes, dtype=torch.int32),
            piece_E=torch.tensor(own),
            keys_K=torch.cat([torch.arange(part.start, part.stop) for ranges in keys for part in ranges]),
            cu_seqlens_k=torch.tensor([0, *itertools.accumulate(num_keys)], dtype=torch.int32),
            max_seqlen_k=max(num_keys),
        ),
    )


def common_prefix(group: Sequence[Example]) -> int:
    """Return how many tokens the examples of a group can share.

    They are equal in all of them, no label is among them, and each example has at least one more: the last token that
    is equal belongs to each example, since it predicts what comes next in each.
    """
    import numpy as np

    if len(group) < 2:
        return 0
    first = group[0]
    num_equal = min(len(example.token_ids) for example in group)
    for example in group:
        differs = np.flatnonzero(example.token_ids[:num_equal] != first.token_ids[:num_equal])
        is_trained = np.flatnonzero(example.loss_mask[1:num_equal]) + 1
        num_equal = min([num_equal, *differs[:1].tolist(), *is_trained[:1].tolist()])
    return max(0, num_equal - 1)


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


def per_label(batch: Batch, values: Sequence[Sequence[float]]) -> Tensor:
    """Lay out a number for each token of each example as the labels are: [B, T], fp32, on the host.

    `values` has a sequence for each of `batch.examples`, as long as its `token_ids`: a weight, an advantage, a
    log-probability of another model. At the position whose label is a token there is the number of that token, and 0
    wherever nothing is trained. Raises PluginError for a sequence of another length.
    """
    import numpy as np
    import torch

    is_label_BT = batch.labels_BT.cpu() != IGNORE_INDEX
    values_N = torch.zeros(is_label_BT.numel())
    if len(values) != len(batch.examples):
        raise PluginError(f"per_label got {len(values)} sequences for a batch of {len(batch.examples)} examples")
    begins, lengths = (tensor.tolist() for tensor in _positions_of_examples(batch))
    for example, numbers, begin, length in zip(batch.examples, values, begins, lengths, strict=True):
        num_tokens = len(example.token_ids)
        if len(numbers) != num_tokens:
            raise PluginError(f"{example.row_id}: per_label got {len(numbers)} numbers for {num_tokens} tokens")
        if length > num_tokens:  # fewer where it shares a prefix
            raise PluginError(
                f"{example.row_id}: has {num_tokens} tokens and {length} positions in its batch; per_label needs a "
                "collator that adds none"
            )
        own = np.asarray(numbers, np.float32)[num_tokens - length + 1 :]
        values_N[begin : begin + len(own)] = torch.from_numpy(own)
    return values_N.view_as(is_label_BT) * is_label_BT


def sum_by_example(batch: Batch, values_N: Tensor) -> Tensor:
    """Sum a number of each position by example: [E], in the order of `batch.row_ids` and the dtype of `values_N`.

    Only positions with a label count, so that the sums are the same padded, packed and with shared prefixes; what is
    elsewhere, even NaN, is not looked at. `values_N` has a value for each position of the batch, [N] or [B, T], as
    `lm.cross_entropy(..., reduction="none").loss` has. Differentiable; the same bits each time. Raises PluginError for
    a batch whose rows or documents are not its examples.
    """
    import torch

    begins_E, lengths_E = _positions_of_examples(batch)
    offsets_T = torch.arange(batch.max_seqlen, device=values_N.device)
    index_ET = (begins_E[:, None] + offsets_T).clamp(max=values_N.numel() - 1)
    counts_ET = (offsets_T < lengths_E[:, None]) & (batch.labels_BT.flatten()[index_ET] != IGNORE_INDEX)
    return torch.where(counts_ET, values_N.flatten()[index_ET], 0.0).sum(1)


def documents_of(batch: Batch) -> list[Tensor]:
    """Return the positions in the flattened batch of all tokens of each example, [T] int64; a prefix is in several."""
    import torch

    begins, lengths = (tensor.tolist() for tensor in _positions_of_examples(batch))
    own = [torch.arange(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]
    if batch.shared is None or batch.cu_seqlens is None:
        return own
    borders = batch.cu_seqlens.tolist()
    prefixes = batch.shared.prefix_P[batch.shared.piece_E].tolist()
    return [
        positions if prefix < 0 else torch.cat([torch.arange(*borders[prefix : prefix + 2]), positions])
        for positions, prefix in zip(own, prefixes, strict=True)
    ]


def _positions_of_examples(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the first of the N positions of each example, and their number: each [E] int64, on the batch's device."""
    import torch

    if batch.cu_seqlens is not None:
        begins_E, lengths_E = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
        if batch.shared is not None:
            begins_E, lengths_E = begins_E[batch.shared.piece_E], lengths_E[batch.shared.piece_E]
    else:
        assert batch.lengths_B is not None
        lengths_E = batch.lengths_B
        begins_E = torch.arange(len(lengths_E), device=lengths_E.device) * batch.input_ids_BT.shape[1]
    if len(begins_E) != len(batch.row_ids):
        raise PluginError(
            f"the batch has {len(batch.row_ids)} examples and {len(begins_E)} rows or documents; per_label and "
            "sum_by_example need one for each example"
        )
    return begins_E, lengths_E


def groups_of(examples: Sequence[Example]) -> list[list[Example]]:
    """Return the examples of each group together, in order of first appearance: what no micro-batch boundary splits."""
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    return list(groups.values())
