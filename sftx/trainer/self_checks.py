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

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.data.collate import documents_of, pack, pad
from sftx.errors import ModelError, PluginError, counted, one_line
from sftx.model.language_model import CausalLM
from sftx.types import Attention, Batch, Collator, Example

_PIECE_TOKENS: Final = 24
_PROBED_GROUPS: Final = ((17, (8, 2, 5)), (9, (3, 6)), (0, (11,)))
"""Tokens of the prefix, and of each branch after it, of the groups with which sharing is checked."""

log = logging.getLogger(__name__)


def check_packing(lm: CausalLM, collator: Collator, examples: Sequence[Example]) -> None:
    """Raise ModelError when documents of a packed row attend to one another; nothing is checked without packing.

    When only varlen attention leaks, the model continues with transformers' own mask, or with one built here.
    """
    groups = [_first_group(examples), _first_group(reversed(examples))]
    if collator.collate(groups[0]).cu_seqlens is None:
        return
    pieces = [_piece(example, number) for number, group in enumerate(groups) for example in group]
    batch = collator.collate(pieces)
    num_documents = 0 if batch.cu_seqlens is None else len(batch.cu_seqlens) - 1
    if num_documents != len(pieces):
        raise PluginError(
            f"{collator}: packs {counted(len(pieces), 'example')} as {counted(num_documents, 'document')}, so that "
            "they see one another; let cu_seqlens have a boundary after each example"
        )
    _check_batch(lm, batch.to(lm.device))


def check_packed_probe(lm: CausalLM) -> None:
    """Check the same of a model that is not the run's, on two documents of any tokens."""
    num_ids = lm.head_weight.shape[0]
    ids = [np.arange(1, _PIECE_TOKENS + 1 - number, dtype=np.int32) * 97 % num_ids for number in range(2)]
    pieces = [Example(own, np.ones(len(own), np.bool_), f"probe {n}", n) for n, own in enumerate(ids)]
    _check_batch(lm, pack(pieces).to(lm.device))
    lm.fault_of_sharing = _fault_of_sharing(lm, "varlen")


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


def share_prefixes(lm: CausalLM, collator: CollatorStage, examples: Sequence[Example]) -> None:
    """Let the collator share the prefixes of a group if that changes nothing; otherwise a line says why it does not."""
    packed = collator.collate(_first_group(examples))
    if not collator.share_prefixes(True):
        reason = (
            f"{collator} packs with transformers' own mask"
            if packed.cu_seqlens is not None
            else f"{collator} pads; --plugin packed, or --set padded.padding_free=true, shares it"
        )
        log.info("the prompt of several answers is computed for each of them: %s", reason)
        return
    if (fault := _fault_of_sharing(lm, packed.attention)) is not None:
        collator.share_prefixes(False)
        log.warning(
            "%s: the prompt of several answers is computed for each of them: %s", type(lm.model).__name__, fault
        )


def _fault_of_sharing(lm: CausalLM, attention: Attention) -> str | None:
    """Return why the model cannot compute rows with shared prefixes, None when it can."""
    if lm.embeds_extras:
        return "an adapter embeds extras, which may differ where the tokens are the same"
    if lm.has_router_loss:
        return "the loss of its router counts every token, and a shared one is there once"
    batch = _shared_probe(lm.head_weight.shape[0], attention).to(lm.device)
    training = lm.training
    lm.eval()
    try:
        return _leak_of_shared(lm, batch)
    finally:
        lm.train(training)


def _shared_probe(num_ids: int, attention: Attention) -> Batch:
    """Return a row of two groups with a prefix each, and of an example without one, of any tokens."""
    examples = []
    for group, (prefix, branches) in enumerate(_PROBED_GROUPS):
        for number, branch in enumerate(branches):
            places = np.arange(prefix + branch)
            own = np.where(places < prefix, 0, 7 * (number + 1))  # what tells the branches from one another
            ids = (1 + 97 * (places + 31 * group) + own).astype(np.int32) % num_ids
            row_id = f"probe {group}, {number}"
            examples.append(Example(ids, places > prefix, row_id, group))
    return pack(examples, attention=attention, share_prefixes=True)


@torch.no_grad()
def _leak_of_shared(lm: CausalLM, batch: Batch) -> str | None:
    """Return the evidence that an example sees another one, or not its prefix; None when there is none."""
    documents = documents_of(batch)
    assert batch.shared is not None
    assert batch.cu_seqlens is not None
    own = slice(*batch.cu_seqlens.tolist()[int(batch.shared.piece_E[0]) :][:2])
    ids_BT = batch.input_ids_BT.clone()
    ids_BT[:, own] = ids_BT[:, own].flip(1).roll(1, 1)
    ids_BT[:, own.start] = batch.input_ids_BT[:, 0]
    others = torch.ones(ids_BT.shape[1], dtype=torch.bool)
    others[own] = False
    try:
        shared_TD = lm.hidden(batch).hidden_BTD[0]
        changed_TD = lm.hidden(dataclasses.replace(batch, input_ids_BT=ids_BT)).hidden_BTD[0]
        alone = [lm.hidden(pad([example]).to(lm.device)).hidden_BTD[0] for example in batch.examples]
    except Exception as error:  # whatever a model's own code raises when it is given what it does not know
        return f"it fails on a row with shared prefixes: {one_line(error)}"
    exact = lm.head_weight.dtype == torch.float32 and not torch.is_autocast_enabled(lm.device.type)
    moved = _distance(changed_TD[others], shared_TD[others], exact=exact)
    off = _distance(torch.cat([shared_TD[positions] for positions in documents]), torch.cat(alone), exact=exact)
    if not max(moved, off) <= _tolerance(exact=exact):
        return f"its states with a shared prefix are {max(moved, off):.1e} of their norm away from those without"
    return None


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
    tolerance = _tolerance(exact=exact)
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


def _tolerance(*, exact: bool) -> float:
    """Return the most that states may differ by, relative to their norm.

    Packed and alone differ by the order of additions. SmolLM2: 2e-6 in fp32, 0.008 in bf16; where its documents see one
    another 1.0 and 0.3.
    """
    return 1e-4 if exact else 0.1


def _distance(one_TD: Tensor, other_TD: Tensor, *, exact: bool) -> float:
    """Return the distance of two states of a token, relative to their norm: the largest when `exact`, else the mean.

    In bf16 a router may send a token another way for a difference in rounding, and a single token tells nothing.
    """
    norms_T = other_TD.float().norm(dim=-1).clamp(min=1e-6)
    distances_T = (one_TD - other_TD).float().norm(dim=-1) / norms_T
    return float(distances_T.max() if exact else distances_T.mean())
