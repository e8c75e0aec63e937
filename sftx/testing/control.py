"""The contract of a control: it decides by what it was told, and a resumed run decides as one without interruption."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cached_property
from typing import Any, Final, TypeAlias

from sftx.assembly.stages.control_stage import ControlStage
from sftx.errors import PluginError
from sftx.events import Decision, EvalReport, StepReport
from sftx.testing.clauses import ClauseError, Suite
from sftx.testing.kit import Kit, make_stage, run_info
from sftx.testing.observer_case import workplace
from sftx.testing.process import process

Report: TypeAlias = StepReport | EvalReport

_LOSSES: Final = (3.0, 2.0, 1.5, 1.4, 1.4, 1.6, 1.7, 1.65, 1.3, 1.8, 1.9, 2.0, 2.1, 2.2, 2.3, 2.4)
"""Losses of successive steps: they fall, stay, rise, reach a new minimum and rise again."""


def _reports(*, held_out: bool) -> Iterator[Report]:
    if held_out:
        yield EvalReport(0, {"loss": 4.0, "exact-match": 0.0})
    for step, loss in enumerate(_LOSSES, start=1):
        yield StepReport(
            step=step,
            num_steps=len(_LOSSES),
            epoch=step / len(_LOSSES),
            loss=loss,
            grad_norm=1.5 / step,
            learning_rate=1e-4,
            num_label_tokens=45,
            num_input_tokens=100,
            seconds=0.25,
            peak_bytes=500_000_000,
            metrics={"token_accuracy": 1 / (1 + loss)},
        )
        if held_out:
            yield EvalReport(step, {"loss": loss + 0.1, "exact-match": 1 / (1 + loss)})


class _Case:
    def __init__(self, kit: Kit) -> None:
        self._plugin = kit.plugin
        self.control()

    def control(self) -> ControlStage:
        with workplace() as directory:
            return ControlStage("the control", make_stage(self._plugin, "sftx_control", run=run_info(directory)))

    def decisions(self, control: ControlStage, reports: list[Report]) -> list[Decision | None]:
        """Return the decision after each report. Raises ClauseError for one that a run would refuse."""
        try:
            return [ask(control, report) for report in reports]
        except PluginError as error:
            raise ClauseError(f"{error}; return sftx.Decision(...), or None to go on") from error

    @cached_property
    def reports(self) -> list[Report]:
        return list(_reports(held_out=True))

    @cached_property
    def uninterrupted(self) -> list[Decision | None]:
        return self.decisions(self.control(), self.reports)


def ask(control: ControlStage, report: Report) -> Decision | None:
    if isinstance(report, StepReport):
        return control.after_step(deepcopy(report))
    return control.after_evaluate(deepcopy(report))


SUITE: Suite[_Case] = Suite("control", _Case)


@SUITE.clause("After any step and any evaluation it returns a Decision or None, also in a run without held-out rows.")
def decides(case: _Case) -> None:
    assert len(case.uninterrupted) == len(case.reports)
    case.decisions(case.control(), list(_reports(held_out=False)))


@SUITE.clause("The same reports lead to the same decisions.", needs=["decides"])
def repeats(case: _Case) -> None:
    again = case.decisions(case.control(), case.reports)
    if again != case.uninterrupted:
        number = next(n for n, pair in enumerate(zip(again, case.uninterrupted, strict=True)) if pair[0] != pair[1])
        raise ClauseError(
            f"after report {number + 1} it decided {case.uninterrupted[number]} in one run and {again[number]} in "
            "another; decide by the reports alone, and keep no state in the class or the module"
        )


@SUITE.clause(
    "What it remembers are JSON values, from which another process decides as it would have.", needs=["repeats"]
)
def resumes(case: _Case) -> None:
    advice = "return everything that it remembers from state_dict, and take it back in load_state_dict"
    for at in range(1, len(case.reports), 3):
        control, resumed = case.control(), case.control()
        case.decisions(control, case.reports[:at])
        try:
            state: dict[str, Any] = control.state_dict()
            resumed.load_state_dict(state)
        except PluginError as error:
            raise ClauseError(f"{error}; {advice}") from error
        rest = case.decisions(resumed, case.reports[at:])
        if rest != case.uninterrupted[at:]:
            raise ClauseError(f"continued after report {at} it decides otherwise than without interruption; {advice}")


@SUITE.clause(
    "It does not change random state, torch's modes, signal handlers or other state of the process.", needs=["decides"]
)
def leaves_the_process(case: _Case) -> None:
    before = process()
    case.decisions(case.control(), case.reports)
    if changed := [name for name, value in process().items() if before.get(name) != value]:
        raise ClauseError(f"it changed {changed[0]}; a run with it would not be the same as without it")


def check_control(plugin: object) -> None:
    """Check the plugin's control. Raises ContractError, which names the broken clauses."""
    SUITE.check(plugin)
