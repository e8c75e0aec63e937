"""A control as a stage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sftx.assembly.stages.stage import Stage
from sftx.events import Decision, EvalReport, StepReport
from sftx.types import Control


class ControlStage(Stage):
    """Asks a control for its decisions, and checks them and what it remembers."""

    def __init__(self, plugin: str, control: Control) -> None:
        super().__init__(plugin)
        self._control = control

    def after_step(self, report: StepReport) -> Decision | None:
        with self._attribute("after_step"):
            return self._checked("after_step", self._control.after_step(report))

    def after_evaluate(self, report: EvalReport) -> Decision | None:
        with self._attribute("after_evaluate"):
            return self._checked("after_evaluate", self._control.after_evaluate(report))

    def state_dict(self) -> dict[str, Any]:
        """Return what the control remembers. Raises PluginError unless JSON gives it back unchanged."""
        with self._attribute("state_dict"):
            state: Any = self._control.state_dict()
        try:
            if isinstance(state, Mapping) and json.loads(json.dumps(dict(state), allow_nan=False)) == dict(state):
                return dict(state)
        except (TypeError, ValueError):
            pass
        raise self._refuse(f"state_dict returned {state!r:.60}, expected a dict of JSON values")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._attribute("load_state_dict"):
            self._control.load_state_dict(state)

    def _checked(self, what: str, decision: Any) -> Decision | None:
        if decision is not None and not isinstance(decision, Decision):
            raise self._refuse(f"{what} returned {type(decision).__name__}, expected a Decision or None")
        for name in () if decision is None else ("evaluate", "save", "stop"):
            if not isinstance(answer := getattr(decision, name), bool):  # any text, even "no", would count as true
                raise self._refuse(f"{what} asked for {name}={answer!r:.60}, expected True or False")
        if decision is not None and not isinstance(decision.reason, str):
            raise self._refuse(f"{what} gave the reason {decision.reason!r:.60}, expected text")
        factor: Any = None if decision is None else decision.rate_factor
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if factor is not None and not (is_number and 0 < factor < math.inf):
            raise self._refuse(f"{what} asked for the rate_factor {factor!r}, expected a number above 0")
        return decision
