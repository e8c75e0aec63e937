"""Tests of the schedule contract: good schedules, and bad ones that break one clause each."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import hookimpl
from sftx.testing.kit import built_in
from sftx.testing.schedule import SUITE


class InverseSquareRoot:
    """Falls with the square root of the step; the classes below change one thing."""

    warmup_start: Any = 0.1

    @hookimpl
    def sftx_schedule(self) -> Any:
        return type(self)()

    def factor(self, step: int, num_steps: int) -> Any:
        return 1 / math.sqrt(1 + step)


class GivesNone(InverseSquareRoot):
    @hookimpl
    def sftx_schedule(self) -> Any:
        return None


class BeginsAbove(InverseSquareRoot):
    warmup_start = 1.5


class FallsBelow(InverseSquareRoot):
    def factor(self, step: int, num_steps: int) -> Any:
        return 1 - step / num_steps


class DividesByTheRest(InverseSquareRoot):
    def factor(self, step: int, num_steps: int) -> Any:
        return 1 / (num_steps - step)


class GivesText(InverseSquareRoot):
    def factor(self, step: int, num_steps: int) -> Any:
        return "1"


class Counts(InverseSquareRoot):
    calls = 0

    def factor(self, step: int, num_steps: int) -> Any:
        self.calls += 1
        return 1 / self.calls


class IsZero(InverseSquareRoot):
    def factor(self, step: int, num_steps: int) -> Any:
        return 0


class Draws(InverseSquareRoot):
    def factor(self, step: int, num_steps: int) -> Any:
        random.random()
        return super().factor(step, num_steps)


BAD = [
    (GivesNone, "made", "is its `return` missing?"),
    (BeginsAbove, "made", "warmup_start is 1.5, expected a number from 0 to 1"),
    (FallsBelow, "gives-factors", "is -1.0, expected a finite number of at least 0"),
    (DividesByTheRest, "gives-factors", "ZeroDivisionError"),
    (GivesText, "gives-factors", "is '1', expected a finite number"),
    (Counts, "is-pure", "so keep no state"),
    (IsZero, "trains", "every factor of a run of 100 steps is 0"),
    (Draws, "leaves-the-process", "it changed Python's random numbers"),
]


@pytest.mark.parametrize("plugin", [InverseSquareRoot(), built_in("warmup-stable-decay-schedule")])
def test_good_schedules_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_schedule_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_schedule_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_each_clause_has_a_bad_schedule() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])
