"""What the contracts of collators and losses share: examples that are hard to batch, and copies of batches.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sftx.types import IGNORE_INDEX, Batch, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHTS = (0.5, 2.0, 0.0, 1.0)


def varied(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Copies with what a collator may trip over: loss weights, padding's id within the text, a trained first token.

    They have groups and row ids of their own. Members of a group change at the same places, so that answers to one
    prompt still have it in common.
    """
    marks = (0, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0)
    first_group = 1 + max(example.group for example in examples)
    copies = []
    for example in examples:
        places = range(len(example.token_ids))
        copies.append(
            dataclasses.replace(
                example,
                token_ids=np.array(
                    [marks[t // 3 % 3] if t % 3 == 2 else example.token_ids[t] for t in places], np.int32
                ),
                loss_mask=np.array([True, *example.loss_mask[1:]]),
                weights=np.array([_WEIGHTS[t % 4] for t in places], np.float32),
                row_id=f"{example.row_id} (varied)",
                group=first_group + example.group,
            )
        )
    return copies


def copy_of(batch: Batch) -> Batch:
    """The same batch in memory of its own."""
    named: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    copied: dict[str, Any] = {name: value.clone() for name, value in named.items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **copied, extras={name: value.clone() for name, value in batch.extras.items()})


def widened(batch: Batch, num: int) -> Batch:
    """The batch with `num` more columns of padding: position ids go on, weights are 1, extras of [B, T] are 0."""
    shape = batch.input_ids_BT.shape

    def wide(tensor_BT: Tensor, value: float) -> Tensor:
        return functional.pad(tensor_BT, (0, num), value=value)

    new_T = torch.arange(shape[1], shape[1] + num)
    weights_BT = batch.token_weights_BT
    return dataclasses.replace(
        batch,
        input_ids_BT=wide(batch.input_ids_BT, 0),
        labels_BT=wide(batch.labels_BT, IGNORE_INDEX),
        position_ids_BT=torch.cat([batch.position_ids_BT, new_T.expand(shape[0], num)], 1),
        token_weights_BT=None if weights_BT is None else wide(weights_BT, 1),
        extras={name: wide(value, 0) if value.shape == shape else value for name, value in batch.extras.items()},
    )


def differences(one: Batch, other: Batch) -> list[str]:
    """The fields in which two batches differ by a bit."""
    found = [
        f.name
        for f in dataclasses.fields(Batch)
        if f.name != "extras" and not _same(getattr(one, f.name), getattr(other, f.name))
    ]
    names = sorted(one.extras.keys() | other.extras.keys())
    return found + [f"extras[{name!r}]" for name in names if not _same(one.extras.get(name), other.extras.get(name))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
