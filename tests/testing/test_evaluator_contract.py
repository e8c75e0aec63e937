"""Tests of the evaluator contract: good evaluators, and bad ones that break one clause each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import ConfigError, hookimpl
from sftx.testing.evaluator import SUITE
from sftx.testing.kit import built_in

QUESTIONS = str(Path(__file__).parents[1] / "helpers" / "questions.jsonl")


class Likely:
    """Scores how likely the tokens of a text are; the classes below change one thing."""

    @hookimpl
    def sftx_evaluator(self) -> Any:
        return self

    def evaluate(self, evaluation: Any) -> Any:
        return {"likely": self.total(evaluation)}

    def total(self, evaluation: Any) -> float:
        return float(evaluation.log_likelihoods([evaluation.encode("The sun", " rises")])[0][0])


class Seeds(Likely):
    """Seeds the global random numbers, which a run restores, so that its scores repeat."""

    def evaluate(self, evaluation: Any) -> Any:
        random.seed(3)
        return {"likely": self.total(evaluation) + random.random()}


class NeedsRows(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        if not evaluation.rows:
            raise ConfigError("give held-out rows with --eval-data")
        return {"longest": max(len(row.reference) for row in evaluation.rows)}


class GivesNothing(Likely):
    @hookimpl
    def sftx_evaluator(self) -> Any:
        return None


class GivesNumber(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        return self.total(evaluation)


class GivesNoScore(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        return {}


class ReportsLoss(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        return {"loss": self.total(evaluation)}


class DividesByRows(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        return {"mean": self.total(evaluation) / len(evaluation.rows)}


class Draws(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        return {"likely": self.total(evaluation) + random.random()}


class Counts(Likely):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def evaluate(self, evaluation: Any) -> Any:
        return {"calls": next(self.calls)}


class Trains(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        total = self.total(evaluation)
        evaluation.lm.train()
        return {"likely": total}


class Rounds(Likely):
    """Changes weights, in the first evaluation by more than in the next ones, which are scored the same."""

    def evaluate(self, evaluation: Any) -> Any:
        next(iter(evaluation.lm.parameters())).data.add_(1e-9)
        return {"one": 1.0}


class LeavesHook(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        evaluation.lm.model.register_forward_hook(lambda *given: None)
        return super().evaluate(evaluation)


class SetsThreads(Likely):
    def evaluate(self, evaluation: Any) -> Any:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return super().evaluate(evaluation)


BAD = [
    (GivesNothing, "made", "is its `return` missing?"),
    (GivesNumber, "scores", "evaluate returned float, expected a mapping"),
    (GivesNoScore, "scores", "return a mapping of names to finite floats"),
    (ReportsLoss, "scores", "it reports the score 'loss'"),
    (DividesByRows, "without-rows", "ZeroDivisionError"),
    (Draws, "repeats", "draw random numbers from a generator with a fixed seed"),
    (Counts, "repeats", "keep nothing between two evaluations"),
    (Trains, "leaves-the-model", "it changed the mode of the model"),
    (Rounds, "leaves-the-model", "it changed the weight model."),
    (LeavesHook, "leaves-the-model", "it changed the hooks of model"),
    (SetsThreads, "leaves-the-process", "it changed torch's number of threads"),
]
GOOD = [Likely(), Seeds(), built_in("multiple-choice", path=QUESTIONS, limit=2)]


@pytest.mark.parametrize("plugin", GOOD, ids=lambda plugin: type(plugin).__name__)
def test_good_evaluators_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


def test_one_that_says_that_it_needs_rows_is_exempt() -> None:
    status = {finding.clause: finding.status for finding in SUITE.findings(NeedsRows())}
    assert status.pop("without-rows") == "exempt"
    assert set(status.values()) == {"ok"}


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_evaluator_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_evaluator_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_each_clause_has_a_bad_evaluator() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])
