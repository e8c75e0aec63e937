"""The contract of a schedule: a pure function of the step, which is never negative, for runs of any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sftx.assembly.stages.optimizer_stages import ScheduleStage
from sftx.errors import PluginError
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.kit import Kit, make_stage
from sftx.testing.process import process

_RUNS: Final = ((0, 1), (0, 2), (1, 3), (3, 3), (5, 3), (10, 110), (0, 100_000))
"""Warm-up steps and all steps of runs, one that warms up to its end and beyond among them."""


class _Case:
    def __init__(self, kit: Kit) -> None:
        self._plugin = kit.plugin
        self.schedule(0, 100)

    def schedule(self, num_warmup_steps: int, num_training_steps: int) -> ScheduleStage:
        given = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
        return ScheduleStage("the schedule", make_stage(self._plugin, "sftx_schedule", **given))

    def calls(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Yield runs, and arguments of `factor` in them: the first and last steps, some between, and some beyond."""
        for run in _RUNS:
            num_steps = max(1, run[1] - run[0])
            steps = {0, 1, num_steps // 3, num_steps // 2, num_steps - 1, num_steps, num_steps + 1, 2 * num_steps + 10}
            for step in sorted(steps):
                yield run, (step, num_steps)

    def factors(self) -> list[float]:
        """Return the factor of each call. Raises ClauseError for one that a run would refuse."""
        try:
            schedules = {run: self.schedule(*run) for run in _RUNS}
            return [schedules[run].factor(*arguments) for run, arguments in self.calls()]
        except PluginError as error:
            raise ClauseError(f"{error}; steps beyond the last, and a run of one step, need a factor too") from error


SUITE: Suite[_Case] = Suite("schedule", _Case)


@SUITE.clause("The factor of every step, also of one beyond the last, is a finite number of at least 0.")
def gives_factors(case: _Case) -> None:
    case.factors()


@SUITE.clause("The factor is a pure function of its arguments, in whatever order it is asked.", needs=["gives-factors"])
def is_pure(case: _Case) -> None:
    expected = dict(zip(case.calls(), case.factors(), strict=True))
    kept = {run: case.schedule(*run) for run in _RUNS}
    for run, arguments in reversed(expected):
        if (factor := kept[run].factor(*arguments)) != expected[run, arguments]:
            raise ClauseError(
                f"factor{arguments} is {expected[run, arguments]:g} once and {factor:g} another time; a resumed run "
                "asks for the steps that are left only, so keep no state"
            )


@SUITE.clause("Some step of a run of 100 steps has a factor above 0.", needs=["gives-factors"])
def trains(case: _Case) -> None:
    schedule = case.schedule(0, 100)
    if not any(schedule.factor(step, 100) for step in range(100)):
        raise ClauseError("every factor of a run of 100 steps is 0, so nothing would be trained")


@SUITE.clause(
    "It does not change random state, torch's modes, signal handlers or other state of the process.",
    needs=["gives-factors"],
)
def leaves_the_process(case: _Case) -> None:
    before = process()
    case.factors()
    if changed := [name for name, value in process().items() if before.get(name) != value]:
        raise ClauseError(f"it changed {changed[0]}; a run with it would not be the same as without it")


def check_schedule(plugin: object) -> None:
    """Check the plugin's schedule. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
