"""Tests of the control contract: good controls, and bad ones that break one clause each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from contracts import assert_every_clause_is_broken, assert_fails, assert_fails_only, assert_passes, whole_suite_cases
from sftx import Control, Decision, EvalReport, StepReport, hookimpl
from sftx.testing.control import SUITE
from sftx.testing.kit import built_in


class Worse(Control):
    """Lowers the rate each time a step is worse than the one before; the classes below change one thing."""

    def __init__(self) -> None:
        self.last, self.factor = 100.0, 1.0

    @hookimpl
    def sftx_control(self) -> Any:
        return type(self)()

    def after_step(self, report: StepReport) -> Any:
        is_worse, self.last = report.loss > self.last, report.loss
        self.factor *= 0.5 if is_worse else 1.0
        return Decision(save=True, rate_factor=self.factor, reason="worse") if is_worse else None

    def state_dict(self) -> Mapping[str, Any]:
        return {"last": self.last, "factor": self.factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last, self.factor = state["last"], state["factor"]


class GivesNone:
    @hookimpl
    def sftx_control(self) -> Any:
        return None


class UnknownEvent(Worse):
    def after_save(self) -> None: ...


class Raises(Worse):
    def after_evaluate(self, report: EvalReport) -> Any:
        return Decision(stop=report.metrics["rouge"] < 1)


class GivesText(Worse):
    def after_step(self, report: StepReport) -> Any:
        return "stop" if super().after_step(report) else None


class GivesZero(Worse):
    def after_step(self, report: StepReport) -> Any:
        return Decision(rate_factor=0.0)


class CountsForAll(Worse):
    calls: ClassVar[Iterator[int]] = itertools.count()

    def after_step(self, report: StepReport) -> Any:
        return Decision(save=next(self.calls) % 7 == 0)


class Forgets(Worse):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = state["last"]


class KeepsTuple(Worse):
    def state_dict(self) -> Mapping[str, Any]:
        return {"last": self.last, "factor": self.factor, "pair": (1, 2)}


class Draws(Worse):
    def after_step(self, report: StepReport) -> Any:
        random.random()
        return super().after_step(report)


BAD = [
    (GivesNone, "made", "is its `return` missing?"),
    (UnknownEvent, "made", "after_save is no event of this sftx's controls"),
    (Raises, "decides", "KeyError: 'rouge'"),
    (GivesText, "decides", "after_step returned str, expected a Decision or None"),
    (GivesZero, "decides", "the rate_factor 0.0, expected a number above 0"),
    (CountsForAll, "repeats", "keep no state in the class or the module"),
    (Forgets, "resumes", "decides otherwise than without interruption"),
    (KeepsTuple, "resumes", "expected a dict of JSON values"),
    (Draws, "leaves-the-process", "it changed Python's random numbers"),
]


@pytest.mark.parametrize("plugin", [Worse(), built_in("early-stopping"), built_in("early-stopping", patience=1)])
def test_good_controls_keep_every_clause(plugin: object) -> None:
    assert_passes(SUITE, plugin)


@pytest.mark.parametrize(("bad", "clause", "message"), BAD)
def test_a_bad_control_fails_its_clause_with_a_message(bad: Any, clause: str, message: str) -> None:
    assert_fails(SUITE, bad(), clause, message)


@pytest.mark.parametrize(("bad", "clause"), whole_suite_cases(BAD))
def test_a_bad_control_fails_nothing_else(bad: Any, clause: str) -> None:
    assert_fails_only(SUITE, bad(), clause)


def test_each_clause_has_a_bad_control() -> None:
    assert_every_clause_is_broken(SUITE, [clause for _, clause, _ in BAD])
