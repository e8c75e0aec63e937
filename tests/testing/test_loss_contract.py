"""Tests of the loss contract: good losses over tokens and pairs, and bad ones that break one clause each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, whole_suite_cases
from packing import Packed
from sftx import (
    IGNORE_INDEX,
    Batch,
    Conversation,
    Example,
    LanguageModel,
    Location,
    Loss,
    LossSum,
    Message,
    Parser,
    Record,
    hookimpl,
    sum_by_example,
)
from sftx.testing.clauses import MADE
from sftx.testing.kit import built_in
from sftx.testing.loss import SUITE, check_loss


def token_losses(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """[B, T], 0 where the label is ignored."""
    loss_BT = functional.cross_entropy(logits_BTV.mT, batch.labels_BT, ignore_index=IGNORE_INDEX, reduction="none")
    return loss_BT if batch.token_weights_BT is None else loss_BT * batch.token_weights_BT


class CrossEntropy:
    """A good loss; most bad ones change one thing of it."""

    @hookimpl
    def sftx_loss(self) -> Loss:
        return self

    def denominator(self, batch: Batch) -> float:
        return float(batch.num_label_tokens)

    def logits(self, lm: LanguageModel, batch: Batch) -> Tensor:
        return lm.logits(lm.hidden(batch).hidden_BTD)

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        logits_BTV = self.logits(lm, batch)
        loss = token_losses(logits_BTV, batch).sum()
        right = (logits_BTV.argmax(-1) == batch.labels_BT).sum()
        return LossSum(loss, metrics={"nll": loss, "token_accuracy": right})


class InSinglePrecision(CrossEntropy):
    """A good loss that casts the logits to fp32, as is usual."""

    def logits(self, lm: LanguageModel, batch: Batch) -> Tensor:
        return super().logits(lm, batch).float()


class Preferences(CrossEntropy):
    """A good loss: DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7), summed over pairs of its own format."""

    beta = 0.1
    fields: ClassVar[str] = "ask, good, bad"
    samples: ClassVar[Sequence[Record]] = (
        {"ask": "What is 2 + 3?", "good": "5", "bad": "It may be 6."},
        {"ask": "The capital of France?", "good": "Paris is the capital of France.", "bad": "Rome"},
    )

    @hookimpl
    def sftx_parser(self) -> Parser:
        return self

    def accepts(self, record: Record) -> bool:
        return record.keys() == {"ask", "good", "bad"}

    def parse(self, record: Record, where: Location) -> tuple[Conversation, ...]:
        ask = Message("user", record["ask"])
        return tuple(Conversation((ask, Message("assistant", record[which]))) for which in ("good", "bad"))

    def denominator(self, batch: Batch) -> float:
        return len(batch.row_ids) / 2

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        ours_B = -token_losses(self.logits(lm, batch), batch).sum(1)
        with torch.no_grad(), lm.without_adapters():
            before_B = -token_losses(self.logits(lm, batch), batch).sum(1)
        rewards_B = self.beta * (ours_B - before_B)
        margin_P = rewards_B[::2] - rewards_B[1::2]
        metrics = {"margin": margin_P.sum(), "accuracy": (margin_P > 0).sum()}
        return LossSum(-functional.logsigmoid(margin_P).sum(), metrics=metrics)


def change(out: LossSum, **changes: Any) -> LossSum:
    return dataclasses.replace(out, **changes)


# --- what it returns --------------------------------------------------------------------------------------------


class ReturnsATensor(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> Any:
        return super().__call__(lm, batch).sum


class SumPerRow(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        return LossSum(token_losses(self.logits(lm, batch), batch).sum(1))


class NotANumber(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        return change(out, sum=out.sum * torch.nan)


class HalfPrecision(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        return change(out, sum=out.sum.bfloat16())


class Detached(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        return change(out, sum=out.sum.detach())


class MetricsAsFloats(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        return change(super().__call__(lm, batch), metrics={"nll": 1.0})


# --- what it takes from its examples ------------------------------------------------------------------------------


class PairsByExamples(Preferences):
    """A good loss: the same DPO, which finds its pairs by its own extras, in whatever layout the run's batches have."""

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        firsts: dict[int, int] = {}
        pairs = [(firsts[e.group], n) for n, e in enumerate(batch.examples) if firsts.setdefault(e.group, n) != n]
        return {"pair_P2": torch.tensor(pairs)}

    def denominator(self, batch: Batch) -> float:
        return len(batch.extras["pair_P2"])

    def log_likelihoods(self, lm: LanguageModel, batch: Batch) -> Tensor:
        hidden = lm.hidden(batch)
        weights_BT = batch.token_weights_BT
        nll = lm.cross_entropy(hidden.hidden_BTD, batch.labels_BT, token_weights_BT=weights_BT, reduction="none").loss
        return -sum_by_example(batch, nll)

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        ours_E = self.log_likelihoods(lm, batch)
        with torch.no_grad(), lm.without_adapters():
            before_E = self.log_likelihoods(lm, batch)
        good_P, bad_P = (self.beta * (ours_E - before_E))[batch.extras["pair_P2"]].unbind(1)
        margin_P = good_P - bad_P
        return LossSum(-functional.logsigmoid(margin_P).sum(), metrics={"margin": margin_P.sum()})


class PackedPairs(PairsByExamples, Packed):
    """A good loss on packed rows."""


class ReferenceOnce(PairsByExamples):
    """A good loss: what the model without its adapters says of an example is computed once."""

    def prepare(self, examples: Sequence[Example]) -> None:
        self.known = {example.row_id for example in examples}

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        assert {example.row_id for example in batch.examples} <= self.known
        return super().extras(batch)

    def precompute(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        return {"before_E": self.log_likelihoods(lm, batch)}

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        rewards_E = self.beta * (self.log_likelihoods(lm, batch) - batch.extras["before_E"])
        good_P, bad_P = rewards_E[batch.extras["pair_P2"]].unbind(1)
        return LossSum(-functional.logsigmoid(good_P - bad_P).sum())


class ReferenceOfTheBatch(ReferenceOnce):
    def precompute(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        before_E = super().precompute(lm, batch)["before_E"]
        return {"before_E": before_E - before_E.mean()}


class ExtrasAtRandom(PairsByExamples):
    def extras(self, batch: Batch) -> dict[str, Tensor]:
        noise = torch.randn(1, generator=torch.Generator().manual_seed(torch.initial_seed()))
        return super().extras(batch) | {"noise_1": noise}


class ExtrasDraw(PairsByExamples):
    def extras(self, batch: Batch) -> dict[str, Tensor]:
        torch.rand(1)
        return super().extras(batch)


class ExtrasWrite(PairsByExamples):
    def extras(self, batch: Batch) -> dict[str, Tensor]:
        batch.labels_BT[:, 0] = 5
        return super().extras(batch)


# --- what it leaves ---------------------------------------------------------------------------------------------


class LeavesEvaluation(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        lm.eval()
        return super().__call__(lm, batch)


class LeavesAdaptersOff(Preferences):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        for layer in lm.modules():
            if hasattr(layer, "lora_A"):
                layer.enabled = False
        return out


class GoesBackwardItself(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        if out.sum.requires_grad:
            out.sum.backward(retain_graph=True)
        return out


class WritesLabels(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        batch.labels_BT[:, 0] = 5
        return out


class SeedsItself(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        torch.manual_seed(0)
        return super().__call__(lm, batch)


# --- its denominator, evaluation --------------------------------------------------------------------------------


class DividesByNothing(CrossEntropy):
    def denominator(self, batch: Batch) -> float:
        return 0.0


class DenominatorOnTheDevice(CrossEntropy):
    def denominator(self, batch: Batch) -> Any:
        return (batch.labels_BT != IGNORE_INDEX).sum()


class CountsCalls(CrossEntropy):
    calls: ClassVar[Iterator[int]] = itertools.count(1)

    def denominator(self, batch: Batch) -> float:
        return float(batch.num_label_tokens + next(self.calls))


class KeepsTheGraph(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        with torch.enable_grad():
            return super().__call__(lm, batch)


class AlwaysTrains(CrossEntropy):
    """Switches the model to training when it evaluates."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        lm.train()
        return super().__call__(lm, batch)


class NeedsTheGraph(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        if not torch.is_grad_enabled():
            raise RuntimeError("element 0 of tensors does not require grad")
        return super().__call__(lm, batch)


class InfiniteInEvaluation(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        return out if lm.training else change(out, metrics={"perplexity": out.sum.exp()})


# --- padding and split ------------------------------------------------------------------------------------------


class CountsColumns(CrossEntropy):
    """Takes the mean over the columns of each row, times a length that depends on the padding."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        return LossSum(100 * token_losses(self.logits(lm, batch), batch).mean(1).sum())


class DenominatorOfAllTokens(CrossEntropy):
    def denominator(self, batch: Batch) -> float:
        return float(batch.input_ids_BT.numel())


class PaddedGradient(CrossEntropy):
    """Returns the right sum with a gradient that is scaled by the share of padding."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        share = 1e-3 * batch.input_ids_BT.shape[1] / batch.max_seqlen
        return change(out, sum=out.sum + share * (out.sum - out.sum.detach()))


class Mean(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        return change(out, sum=out.sum / batch.num_label_tokens)


class MeanMetric(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        return change(out, metrics={"nll": out.metrics["nll"] / batch.num_label_tokens})


class OneForABatch(CrossEntropy):
    def denominator(self, batch: Batch) -> float:
        return 1.0


class NormalisesWeights(CrossEntropy):
    """Normalises the weights of a batch to the mean 1."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        weights_BT = batch.token_weights_BT
        if weights_BT is not None:
            mean = weights_BT[batch.labels_BT != IGNORE_INDEX].mean()
            batch = dataclasses.replace(batch, token_weights_BT=weights_BT / mean)
        return super().__call__(lm, batch)


# --- what is trained, and how -----------------------------------------------------------------------------------


class RegularisesPrompts(CrossEntropy):
    """Adds a z-loss on every non-padding token, prompts included."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        assert batch.lengths_B is not None
        logits_BTV = self.logits(lm, batch)
        real_BT = torch.arange(logits_BTV.shape[1]) < batch.lengths_B[:, None]
        z_loss = (logits_BTV.logsumexp(-1)[real_BT] ** 2).sum()
        return LossSum(token_losses(logits_BTV, batch).sum() + 1e-3 * z_loss)


class DetachedHead(CrossEntropy):
    def logits(self, lm: LanguageModel, batch: Batch) -> Tensor:
        return lm.hidden(batch).hidden_BTD @ lm.head_weight.detach().T


class DetachedHidden(CrossEntropy):
    def logits(self, lm: LanguageModel, batch: Batch) -> Tensor:
        return lm.logits(lm.hidden(batch).hidden_BTD.detach())


class FreezesALayer(CrossEntropy):
    """Freezes a layer during the forward: the gradient is right along itself, but zero in this layer."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        parameter = next(parameter for name, parameter in lm.named_parameters() if "v_proj.lora_B" in name)
        parameter.requires_grad_(False)
        out = super().__call__(lm, batch)
        parameter.requires_grad_()
        return out


class OnePercentTooMuch(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        out = super().__call__(lm, batch)
        return change(out, sum=out.sum + 0.01 * (out.sum - out.sum.detach()))


class ReferenceThatMoves(Preferences):
    """Uses the trained model, detached, as its reference: there is a gradient, but the sum never changes."""

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        ours_B = -token_losses(self.logits(lm, batch), batch).sum(1)
        margin_P = self.beta * (ours_B - ours_B.detach())[::2]
        return LossSum(-functional.logsigmoid(margin_P).sum())


class MakesNone:
    @hookimpl
    def sftx_loss(self) -> Any:
        return None


class IgnoresWeights(CrossEntropy):
    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        return super().__call__(lm, dataclasses.replace(batch, token_weights_BT=None))


BAD = [
    (ExtrasAtRandom, "makes-its-extras", "were different the second time"),
    (ExtrasDraw, "makes-its-extras", "compute them from batch.examples alone"),
    (ExtrasWrite, "makes-its-extras", "wrote into the batch's labels_BT"),
    (ReferenceOfTheBatch, "precomputes-by-example", "compute each example's number of its own positions"),
    (IgnoresWeights, "obeys-the-weights", "whatever token_weights_BT says"),
    (MakesNone, MADE, "sftx_loss returned NoneType, expected a Loss"),
    (ReturnsATensor, "returns-a-sum", "it returned Tensor; return LossSum"),
    (SumPerRow, "returns-a-sum", "sum is of shape [4]"),
    (NotANumber, "returns-a-sum", "sum is nan"),
    (HalfPrecision, "returns-a-sum", "sum is torch.bfloat16"),
    (Detached, "returns-a-sum", "do not detach it"),
    (MetricsAsFloats, "returns-a-sum", "metrics['nll'] is of float"),
    (LeavesEvaluation, "leaves-the-model", "the training mode of lm is not what it was"),
    (LeavesAdaptersOff, "leaves-the-model", "are its adapters on?"),
    (GoesBackwardItself, "leaves-the-model", "leave backward() and updates to the trainer"),
    (WritesLabels, "leaves-the-model", "wrote into the batch's labels_BT"),
    (SeedsItself, "leaves-the-model", "derive random numbers from lm.seed"),
    (DividesByNothing, "knows-its-denominator", "label tokens is 0.0"),
    (DenominatorOnTheDevice, "knows-its-denominator", "without waiting for a device"),
    (CountsCalls, "knows-its-denominator", "count only the batch"),
    (KeepsTheGraph, "evaluates", "keeps a graph"),
    (AlwaysTrains, "evaluates", "the training mode of lm is not what it was"),
    (NeedsTheGraph, "evaluates", "raised RuntimeError"),
    (InfiniteInEvaluation, "evaluates", "metrics['perplexity'] is inf"),
    (CountsColumns, "padding-changes-nothing", "more columns of padding sum is"),
    (DenominatorOfAllTokens, "padding-changes-nothing", "with more padding the denominator is"),
    (PaddedGradient, "padding-changes-nothing", "with more padding the gradient is off"),
    (Mean, "splits", "return sums and not means"),
    (MeanMetric, "splits", "metrics['nll'] is"),
    (OneForABatch, "splits", "denominator is 1 for 4 groups"),
    (NormalisesWeights, "splits", "let no example depend on the others"),
    (RegularisesPrompts, "trains-only-labels", "take only the positions that have a label"),
    (DetachedHead, "right-gradient", "look for a detach()"),
    (FreezesALayer, "right-gradient", "along a random direction"),
    (DetachedHidden, "right-gradient", "or a custom backward"),
    (OnePercentTooMuch, "right-gradient", "along itself"),
    (ReferenceThatMoves, "right-gradient", "and the sum changes by"),
]


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_loss_fails_its_clause_with_a_message(bad: type, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_loss_fails_nothing_else(bad: type, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_there_is_a_bad_loss_for_each_clause() -> None:
    assert_every_clause_is_broken(SUITE, (clause for _, clause, _ in BAD))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"workspace_mb": 1}])
def test_masked_ce_keeps_the_contract(options: dict[str, Any]) -> None:
    check_loss(built_in("masked-ce", **options))


class PackedCrossEntropy(CrossEntropy, Packed):
    """A good plugin that is both a collator and a loss."""


@pytest.mark.parametrize("good", [CrossEntropy, InSinglePrecision, Preferences, PackedCrossEntropy])
def test_a_good_loss_of_another_kind_keeps_it(good: type) -> None:
    check_loss(good())


@pytest.mark.parametrize("good", [PairsByExamples, PackedPairs, ReferenceOnce])
def test_a_good_loss_that_looks_at_its_examples_keeps_it(good: type) -> None:
    check_loss(good())
