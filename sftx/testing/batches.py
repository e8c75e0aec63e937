"""Helpers of the contracts of collators and losses: difficult examples, changed batches, norms of gradients.

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

from sftx.data.example_values import Values, places_of
from sftx.types import IGNORE_INDEX, Batch, Example, SharedPrefixes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftx.assembly.stages.data_stages import CollatorStage
    from sftx.assembly.stages.loss_stage import LossStage
    from sftx.model.language_model import CausalLM

_WEIGHTS = (0.5, 2.0, 0.0, 1.0)


def varied(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return difficult copies: with loss weights, with the padding id inside the text, with a trained first token.

    Their groups and row ids are new. Examples of one group change at the same positions, so that answers to one prompt
    still have it in common. In an example with extras only trained tokens change: others may stand for the extras.
    """
    marks = (0, tokenizer.pad_token_id or 0, tokenizer.eos_token_id or 0)
    first_group = 1 + max(example.group for example in examples)
    return [
        dataclasses.replace(
            example,
            token_ids=np.array(
                [
                    marks[t // 3 % 3] if t % 3 == 2 and (is_trained or not example.extras) else token_id
                    for t, (token_id, is_trained) in enumerate(zip(example.token_ids, example.loss_mask, strict=True))
                ]
            ),
            loss_mask=np.array([True, *example.loss_mask[1:]]),
            weights=np.array([_WEIGHTS[t % 4] for t in range(len(example.token_ids))]),
            row_id=f"{example.row_id} (varied)",
            group=first_group + example.group,
        )
        for example in examples
    ]


def precomputed(
    loss: LossStage, collator: CollatorStage, lm: CausalLM, groups: Sequence[Sequence[Example]]
) -> Values | None:
    """Return what the loss computes before training of the examples of these groups, one group at a time, in order.

    None for a loss that computes nothing. The model is taken as it was before its adapters were trained.
    """
    if not loss.has_precompute:
        return None
    columns: dict[str, list[np.ndarray[Any, np.dtype[np.float32]]]] = {}
    training = lm.training
    lm.eval()
    with torch.no_grad(), lm.without_adapters():
        for group in groups:
            batch = loss.with_extras(collator.collate(group))
            for name, value_E in loss.precompute(lm, copy_of(batch)).items():
                column = np.empty(len(group), np.float32)
                column[places_of(batch, group)] = value_E.numpy()
                columns.setdefault(name, []).append(column)
    lm.train(training)
    return Values({name: np.concatenate(parts) for name, parts in columns.items()})


def copy_of(batch: Batch) -> Batch:
    """Return a copy of the batch whose tensors have memory of their own."""
    fields: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    tensors: dict[str, Any] = {name: value.clone() for name, value in fields.items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **tensors, extras={name: value.clone() for name, value in batch.extras.items()})


def widened(batch: Batch, num: int) -> Batch:
    """Return the batch with `num` more columns of padding: labels are ignored, weights 1, extras of [B, T] 0."""
    shape = batch.input_ids_BT.shape

    def pad(tensor_BT: Tensor, value: float) -> Tensor:
        return functional.pad(tensor_BT, (0, num), value=value)

    new_T = torch.arange(shape[1], shape[1] + num)
    weights_BT = batch.token_weights_BT
    return dataclasses.replace(
        batch,
        input_ids_BT=pad(batch.input_ids_BT, 0),
        labels_BT=pad(batch.labels_BT, IGNORE_INDEX),
        position_ids_BT=torch.cat([batch.position_ids_BT, new_T.expand(shape[0], num)], 1),
        token_weights_BT=None if weights_BT is None else pad(weights_BT, 1),
        extras={name: pad(value, 0) if value.shape == shape else value for name, value in batch.extras.items()},
    )


def differences(first: Batch, second: Batch) -> list[str]:
    """Return the fields in which two batches are not bit-identical."""
    names = [f.name for f in dataclasses.fields(Batch) if f.name != "extras"]
    different = [name for name in names if not identical(getattr(first, name), getattr(second, name))]
    extras = sorted(first.extras.keys() | second.extras.keys())
    return different + [
        f"extras[{name!r}]" for name in extras if not identical(first.extras.get(name), second.extras.get(name))
    ]


def identical(first: Any, second: Any) -> bool:
    """Return whether two values have the same type and, for tensors, the same dtype, shape and bits."""
    if isinstance(first, SharedPrefixes) and isinstance(second, SharedPrefixes):
        return all(identical(value, getattr(second, name)) for name, value in vars(first).items())
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all of the tensors together, summed in fp64."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())
