"""Tests of the reward contract: good rewards, and bad ones that break one clause each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import hookimpl
from sftx.testing.reward import SUITE


class Short:
    """Scores short answers high; the classes below change one thing."""

    @hookimpl
    def sftx_reward(self) -> Any:
        return self

    def __call__(self, answers: Any) -> Any:
        return [self.score(answer) for answer in answers]

    def score(self, answer: Any) -> Any:
        return -len(answer.text)


class Declines(Short):
    """Declines what was cut off, and prepares with the model of the run."""

    num_parameters = 0

    def prepare(self, lm: Any) -> None:
        type(self).num_parameters = lm.head_weight.numel()

    def score(self, answer: Any) -> Any:
        return None if answer.finish_reason == "length" else float(self.num_parameters)


class Compares(Short):
    """Scores an answer by the others to its question."""

    def __call__(self, answers: Any) -> Any:
        longest: dict[str, int] = {}
        for answer in answers:
            row_id, length = answer.question.row_id, len(answer.text)
            longest[row_id] = max(longest.get(row_id, 1), length)
        return [len(answer.text) / longest[answer.question.row_id] for answer in answers]


class GivesNothing(Short):
    @hookimpl
    def sftx_reward(self) -> Any:
        return None


class GivesNumber(Short):
    def __call__(self, answers: Any) -> Any:
        return 1.0


class GivesNan(Short):
    def score(self, answer: Any) -> Any:
        return float("nan") if not answer.text else 1.0


class GivesText(Short):
    def score(self, answer: Any) -> Any:
        return "good"


class ExpectsNumber(Short):
    def score(self, answer: Any) -> Any:
        return float(answer.text)


class SkipsOne(Short):
    def __call__(self, answers: Any) -> Any:
        return [1.0] * max(1, len(answers))


class Ranks(Short):
    """Fails for a single answer, which has no other one to be compared with."""

    def __call__(self, answers: Any) -> Any:
        spread = 1 / (len(answers) - 1)
        return [spread * number for number in range(len(answers))]


class Draws(Short):
    def score(self, answer: Any) -> Any:
        return random.random()


class Counts(Short):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def score(self, answer: Any) -> Any:
        return next(self.calls)


BAD = [
    (GivesNothing, "made", "is its `return` missing?"),
    (GivesNumber, "scores-any-answer", "reward returned float, expected a list of numbers"),
    (GivesNan, "scores-any-answer", "is nan, expected a finite number"),
    (GivesText, "scores-any-answer", "is 'good', expected a finite number"),
    (ExpectsNumber, "scores-any-answer", "could not convert string to float"),
    (SkipsOne, "any-number", "reward returned 1 score for 0 answers"),
    (Ranks, "any-number", "ZeroDivisionError"),
    (Draws, "repeats", "it drew from or seeded Python's random numbers"),
    (Counts, "repeats", "keep no state between two calls"),
]


@pytest.mark.parametrize("plugin", [Short(), Declines(), Compares()], ids=lambda plugin: type(plugin).__name__)
def test_good_rewards_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_reward_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_reward_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_each_clause_has_a_bad_reward() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])
