"""Early stopping: a run ends when its held-out rows get no better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from sftx import Control, Decision, EvalReport, RunInfo, hookimpl


@dataclass(frozen=True, eq=False)
class EarlyStopping:
    """Stops a run after a number of evaluations in a row that are not better than the best one.

    What is better is the run's to say, by metric_for_best_model (the loss by default) and greater_is_better. The
    options `train.early_stopping_patience` and `train.early_stopping_threshold` add this plugin.
    """

    patience: Annotated[int, Field(ge=1, le=10**9, description="Evaluations in a row that are not better.")] = 3
    threshold: Annotated[float, Field(ge=0, description="Least improvement that counts as better.")] = 0.0

    @hookimpl
    def sftx_control(self, run: RunInfo) -> Control:
        train = run.config["train"]
        name = (train["metric_for_best_model"] or "loss").removeprefix("eval_")
        greater = train["greater_is_better"]
        if greater is None:
            greater = not name.endswith(("loss", "perplexity"))
        return _Patience(name, 1 if greater else -1, self.patience, self.threshold)


class _Patience(Control):
    def __init__(self, metric: str, sign: int, patience: int, threshold: float) -> None:
        self._metric = metric
        self._sign = sign
        self._patience = patience
        self._threshold = threshold
        self._best: float | None = None
        self._num_worse = 0

    def after_evaluate(self, report: EvalReport) -> Decision | None:
        value = report.metrics.get(self._metric)
        if value is None or report.step == 0:
            return None
        gain = math.inf if self._best is None else self._sign * (value - self._best)
        self._num_worse = 0 if gain > self._threshold else self._num_worse + 1
        if gain > 0:
            self._best = value
        if self._num_worse < self._patience:
            return None
        return Decision(stop=True, reason=f"{self._metric} was no better {self._num_worse} times in a row")

    def state_dict(self) -> Mapping[str, Any]:
        return {"best": self._best, "num_worse": self._num_worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._num_worse = state["best"], state["num_worse"]
