"""Tests of the collator contract: good collators, and bad ones that break one clause each."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, whole_suite_cases
from packing import Packed
from sftx import IGNORE_INDEX, Batch, Example, Window, hookimpl, pad
from sftx.testing.clauses import MADE
from sftx.testing.collator import SUITE, check_collator
from sftx.testing.kit import Kit, built_in
from sftx.testing.process import random_states_kept
from sftx_plugins.collators.padded import Padded


class InOrder(Padded):
    """A good collator without shuffling and without global state."""

    def plan(self, window: Window) -> Any:
        groups, size = window.groups, window.rows_per_step
        rows = [tuple(i for i, other in enumerate(groups) if other == group) for group in dict.fromkeys(groups)]
        full = len(rows) if window.is_last else len(rows) - len(rows) % size
        steps = [tuple(rows[at : min(full, at + size)]) for at in range(0, full, size)]
        return steps, tuple(i for row in rows[full:] for i in row)


# --- plans ------------------------------------------------------------------------------------------------------


class DropsLast(Padded):
    def plan(self, window: Window) -> Any:
        steps, carried = super().plan(window)
        return [step for step in steps if len(step) == window.rows_per_step], carried


class CarriesOverAtTheEnd(Padded):
    def plan(self, window: Window) -> Any:
        return super().plan(dataclasses.replace(window, is_last=False))


class StepsTooLarge(Padded):
    def plan(self, window: Window) -> Any:
        return super().plan(dataclasses.replace(window, rows_per_step=window.rows_per_step + 1))


class EmptyStep(InOrder):
    def plan(self, window: Window) -> Any:
        steps, carried = super().plan(window)
        return [*steps, ()], carried


class ShortSteps(InOrder):
    def plan(self, window: Window) -> Any:
        return super().plan(dataclasses.replace(window, is_last=True))  # nothing is carried over


class TearsPairs(InOrder):
    def plan(self, window: Window) -> Any:
        return super().plan(dataclasses.replace(window, groups=range(len(window.groups))))


class TurnsPairs(InOrder):
    def plan(self, window: Window) -> Any:
        steps, carried = super().plan(window)
        return [tuple(row[::-1] for row in step) for step in steps], carried


class ShufflesAnyhow(InOrder):
    def plan(self, window: Window) -> Any:
        steps, carried = super().plan(window)
        return [tuple(sorted(step, key=lambda row: hash((row, torch.initial_seed())))) for step in steps], carried


class DrawsFromTorch(InOrder):
    def plan(self, window: Window) -> Any:
        torch.rand(1)
        return super().plan(window)


class SortsItsArguments(InOrder):
    def plan(self, window: Window) -> Any:
        window.lengths.sort()  # type: ignore[attr-defined]
        return super().plan(window)


class EverySecondBackwards(InOrder):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def plan(self, window: Window) -> Any:
        steps, carried = super().plan(window)
        return (steps[::-1] if next(self.calls) % 2 else steps), carried


# --- batches ----------------------------------------------------------------------------------------------------


def change(batch: Batch, **changes: Any) -> Batch:
    return dataclasses.replace(batch, **changes)


class ExamplesInAnotherOrder(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        return change(super().collate(examples), examples=tuple(examples[::-1]))


class RowIdsOfTheFirst(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        return change(super().collate(examples), row_ids=(examples[0].row_id,))


class Cuts(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        cut = [dataclasses.replace(e, token_ids=e.token_ids[:60], loss_mask=e.loss_mask[:60]) for e in examples]
        weights = [None if e.weights is None else e.weights[:60] for e in cut]
        return super().collate([dataclasses.replace(e, weights=w) for e, w in zip(cut, weights, strict=True)])


class NoBorders(Packed):
    def collate(self, examples: Sequence[Example]) -> Batch:
        return change(super().collate(examples), cu_seqlens=None)


class CountsTheFirstToken(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        return change(super().collate(examples), num_label_tokens=sum(int(e.loss_mask.sum()) for e in examples) + 1)


class CountsPadding(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        return change(batch, num_input_tokens=batch.input_ids_BT.numel())


class CountsOnTheDevice(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        return change(batch, max_seqlen=torch.tensor(batch.max_seqlen))


class SmallLabels(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        return change(batch, labels_BT=batch.labels_BT.int())


class PositionsRunOn(Packed):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        return change(batch, position_ids_BT=torch.arange(batch.num_input_tokens)[None])


class PadsAtRandom(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        return pad(examples, multiple_of=8 * random.Random(torch.initial_seed()).randint(1, 50))


class DrawsInCollate(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        random.random()
        return super().collate(examples)


class WritesIntoExamples(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        examples[0].loss_mask[0] = not examples[0].loss_mask[0]
        return batch


def recounted(batch: Batch, labels_BT: torch.Tensor) -> Batch:
    return change(batch, labels_BT=labels_BT, num_label_tokens=int((labels_BT != IGNORE_INDEX).sum()))


class ForgetsWeights(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        return change(super().collate(examples), token_weights_BT=None)


class DoesNotShiftWeights(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        weights_BT = batch.token_weights_BT
        return change(batch, token_weights_BT=None if weights_BT is None else weights_BT.roll(1, 1))


class ShiftsTwice(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        return recounted(batch, functional.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX))


class MasksByPaddingsId(Padded):
    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        return recounted(batch, batch.labels_BT.masked_fill(batch.labels_BT == 0, IGNORE_INDEX))


class TrainsTheNextDocument(Packed):
    """Trains the last token of a document to predict the first one of the next document."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        labels_BT, ids_BT = batch.labels_BT.clone(), batch.input_ids_BT
        for example, border in zip(examples[1:], batch.cu_seqlens[1:-1].tolist(), strict=True):  # type: ignore[index]
            if example.loss_mask[0]:
                labels_BT[0, border - 1] = ids_BT[0, border]
        return recounted(batch, labels_BT)


class Reweighs(Padded):
    """Moves weight between the tokens of a batch so that the sum of the losses is right and each token's is wrong."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = super().collate(examples)
        with random_states_kept():
            lm = Kit(self).language_model().eval()
        with torch.no_grad():
            logits_BTV = lm.logits(lm.hidden(batch).hidden_BTD)
        loss_BT = functional.cross_entropy(logits_BTV.mT, batch.labels_BT, reduction="none")
        weights_BT = torch.ones(loss_BT.shape) if batch.token_weights_BT is None else batch.token_weights_BT.clone()
        one, other = (loss_BT * weights_BT).nonzero()[:2].tolist()
        weights_BT[*one] += 0.1
        weights_BT[*other] -= 0.1 * loss_BT[*one] / loss_BT[*other]
        return change(batch, token_weights_BT=weights_BT)


class MakesNone:
    @hookimpl
    def sftx_collator(self) -> Any:
        return None


BAD = [
    (MakesNone, MADE, "sftx_collator returned NoneType, expected a Collator"),
    (DropsLast, "plans-every-example", "put every index into one row"),
    (CarriesOverAtTheEnd, "plans-every-example", "with is_last=True"),
    (StepsTooLarge, "fills-its-steps", "a step of 2 rows"),
    (EmptyStep, "fills-its-steps", "without examples; leave it out"),
    (ShortSteps, "fills-its-steps", "carry over what does not fill a step"),
    (TearsPairs, "keeps-groups-together", "make rows of complete groups"),
    (TurnsPairs, "keeps-groups-together", "or changes their order"),
    (ShufflesAnyhow, "plans-by-its-arguments", "draw from random.Random"),
    (DrawsFromTorch, "plans-by-its-arguments", "drew from torch's random numbers"),
    (SortsItsArguments, "plans-by-its-arguments", "changed the lengths or groups"),
    (EverySecondBackwards, "plans-by-its-arguments", "keep no state between two calls"),
    (ExamplesInAnotherOrder, "batches-every-example", "not in the order of row_ids"),
    (RowIdsOfTheFirst, "batches-every-example", "row_id into row_ids once"),
    (Cuts, "batches-every-example", "are no document of a batch"),
    (NoBorders, "batches-every-example", "set lengths_B"),
    (CountsTheFirstToken, "counts-what-it-holds", "num_label_tokens is"),
    (CountsPadding, "counts-what-it-holds", "num_input_tokens is"),
    (CountsOnTheDevice, "counts-what-it-holds", "max_seqlen is tensor("),
    (SmallLabels, "counts-what-it-holds", "labels_BT is torch.int32"),
    (PositionsRunOn, "counts-what-it-holds", "count from 0 in each"),
    (PadsAtRandom, "collates-by-its-arguments", "a batch with other input_ids_BT"),
    (DrawsInCollate, "collates-by-its-arguments", "drew from Python's random numbers"),
    (WritesIntoExamples, "collates-by-its-arguments", "copy what you change"),
    (ForgetsWeights, "changes-no-loss", "one by one"),
    (DoesNotShiftWeights, "changes-no-loss", "one by one"),
    (ShiftsTwice, "changes-no-loss", "one by one"),
    (MasksByPaddingsId, "changes-no-loss", "one by one"),
    (TrainsTheNextDocument, "changes-no-loss", "one by one"),
    (Reweighs, "changes-no-gradient", "though its loss is right"),
]


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_collator_fails_its_clause_with_a_message(bad: type, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_collator_fails_nothing_else(bad: type, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_there_is_a_bad_collator_for_each_clause() -> None:
    assert_every_clause_is_broken(SUITE, (clause for _, clause, _ in BAD))


@pytest.mark.parametrize("options", [{}, {"group_by_length": False}, {"pad_to_multiple_of": 64}])
def test_padded_keeps_the_contract(options: dict[str, Any]) -> None:
    check_collator(built_in("padded", **options))


@pytest.mark.parametrize("good", [Packed, InOrder])
def test_a_good_collator_of_another_kind_keeps_it(good: type) -> None:
    check_collator(good())
