"""The control `plateau`: ends a run whose training loss has not fallen for some steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from sftx import Control, Decision, RunInfo, StepReport, hookimpl


@dataclass(frozen=True, eq=False)
class Plateau:
    """Ends a run whose training loss has not fallen for some steps."""

    patience: Annotated[int, Field(ge=1, le=10**6, description="Steps without a lower loss.")] = 50
    least: Annotated[float, Field(ge=0, description="Fall of the loss, in nats, that counts as lower.")] = 0.01

    @hookimpl
    def sftx_control(self, run: RunInfo) -> Control:
        return _Watch(self.patience, self.least)


class _Watch(Control):
    def __init__(self, patience: int, least: float) -> None:
        self._patience, self._least = patience, least
        self._lowest: float | None = None
        self._waited = 0

    def after_step(self, report: StepReport) -> Decision | None:
        if self._lowest is None or report.loss < self._lowest - self._least:
            self._lowest, self._waited = report.loss, 0
            return None
        self._waited += 1
        if self._waited < self._patience:
            return None
        return Decision(stop=True, save=True, reason=f"no lower loss for {self._waited} steps")

    def state_dict(self) -> Mapping[str, Any]:
        return {"lowest": self._lowest, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._lowest, self._waited = state["lowest"], state["waited"]
