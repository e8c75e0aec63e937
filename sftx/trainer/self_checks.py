"""Check, before the first step, that no document of a packed row attends to another.

Short pieces of the run's own examples are packed as the run will pack them. Each must have the states that it has
alone, and the others must keep theirs when the first one's tokens change.

Dimensions: T tokens, D hidden.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from sftx.data.collate import pack, pad
from sftx.errors import ModelError, one_line
from sftx.model.language_model import CausalLM
from sftx.types import Batch, Collator, Example

_PIECE_TOKENS: Final = 24

log = logging.getLogger(__name__)


def check_packing(lm: CausalLM, collator: Collator, examples: Sequence[Example]) -> None:
    """Raise ModelError when documents of a packed row attend to one another; nothing is checked without packing.

    When only varlen attention leaks, the model continues with transformers' own mask, or with one built here.
    """
    groups = [_first_group(examples), _first_group(reversed(examples))]
    if collator.collate(groups[0]).cu_seqlens is None:
        return
    pieces = [_piece(example, number) for number, group in enumerate(groups) for example in group]
    _check_batch(lm, collator.collate(pieces).to(lm.device))


def check_packed_probe(lm: CausalLM) -> None:
    """Check the same of a model that is not the run's, on two documents of any tokens."""
    num_ids = lm.head_weight.shape[0]
    ids = [np.arange(1, _PIECE_TOKENS + 1 - number, dtype=np.int32) * 97 % num_ids for number in range(2)]
    pieces = [Example(own, np.ones(len(own), np.bool_), f"probe {n}", n) for n, own in enumerate(ids)]
    _check_batch(lm, pack(pieces).to(lm.device))


def _check_batch(lm: CausalLM, batch: Batch) -> None:
    training = lm.training
    lm.eval()
    try:
        with lm.ignoring_extras():  # a piece of an example may lack the tokens that stand for them
            leak = _leak(lm, batch)
            if leak is not None and lm.attention_of(batch) == "varlen":
                lm.give_up_varlen(leak)
                leak = _leak(lm, batch)
            if leak is not None and lm.attention_of(batch) == "mask":
                lm.give_up_mask()
                if _leak(lm, batch) is None:
                    log.warning(
                        "%s: packed with attention 'mask4d', as with its own mask %s", type(lm.model).__name__, leak
                    )
                    leak = None
    finally:
        lm.train(training)
    if leak is not None:
        raise ModelError(
            f"{type(lm.model).__name__}: documents that are packed into one row see one another with attention "
            f"{lm.attention_of(batch)!r}: {leak}; train with the collator padded"
        )


def _first_group(examples: Iterable[Example]) -> list[Example]:
    """Return the examples that share a group with the first: a collator may need them together."""
    _, group = next(itertools.groupby(examples, key=lambda example: example.group))
    return list(group)


def _piece(example: Example, number: int) -> Example:
    """Return the beginning of an example, in the group of that number."""
    length = _PIECE_TOKENS - number  # two lengths: a border is not found in the middle by chance
    return dataclasses.replace(
        example,
        token_ids=example.token_ids[:length],
        loss_mask=example.loss_mask[:length],
        weights=None,
        row_id=f"{example.row_id} ({number})",
        group=number,
    )


@torch.no_grad()
def _leak(lm: CausalLM, batch: Batch) -> str | None:
    """Return the evidence that documents attend to one another, or None when they do not."""
    assert batch.cu_seqlens is not None
    borders = batch.cu_seqlens.tolist()
    documents = [batch.input_ids_BT[0, start:end].cpu().numpy() for start, end in itertools.pairwise(borders)]
    try:
        packed_TD = lm.hidden(batch).hidden_BTD[0]
        changed_TD = lm.hidden(dataclasses.replace(batch, input_ids_BT=_first_changed(batch, borders[1]))).hidden_BTD[0]
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code raises when it is given what it does not know
        return f"it fails on a packed row: {one_line(error)}"
    alone = [pad([Example(ids, np.ones(len(ids), np.bool_), "alone", 0)]).to(lm.device) for ids in documents]
    alone_TD = torch.cat([lm.hidden(one).hidden_BTD[0] for one in alone])
    exact = lm.head_weight.dtype == torch.float32 and not torch.is_autocast_enabled(lm.device.type)
    moved = _distance(changed_TD[borders[1] :], packed_TD[borders[1] :], exact=exact)
    off = _distance(packed_TD, alone_TD, exact=exact)
    # Packed and alone differ by the order of additions. SmolLM2: 2e-6 in fp32, 0.008 in bf16; where its documents see
    # one another 1.0 and 0.3.
    tolerance = 1e-4 if exact else 0.1
    if not moved <= tolerance:
        return f"another first document moves the states of the others by {moved:.1e} of their norm"
    if not off <= tolerance:
        return f"the states of a document are {off:.1e} of their norm away from what they are without another one"
    return None


def _first_changed(batch: Batch, border: int) -> Tensor:
    """Return the ids of the batch with the first document changed to other ids of the vocabulary."""
    ids_BT = batch.input_ids_BT.clone()
    ids_BT[:, :border] = ids_BT[:, :border].flip(1).roll(1, 1)
    ids_BT[:, 0] = batch.input_ids_BT[:, -1]
    return ids_BT


def _distance(one_TD: Tensor, other_TD: Tensor, *, exact: bool) -> float:
    """Return the distance of two states of a token, relative to their norm: the largest when `exact`, else the mean.

    In bf16 a router may send a token another way for a difference in rounding, and a single token tells nothing.
    """
    norms_T = other_TD.float().norm(dim=-1).clamp(min=1e-6)
    distances_T = (one_TD - other_TD).float().norm(dim=-1) / norms_T
    return float(distances_T.max() if exact else distances_T.mean())
