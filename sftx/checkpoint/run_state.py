"""The counters of a run and its reports so far: the part of its state that is neither weights, optimizer nor data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftx.checkpoint.layout import checkpoint_path, with_new_names
from sftx.config.options import TrainConfig
from sftx.events import EvalReport, Sample, StepReport, TokenLosses


@dataclass
class RunState:
    """Counters that every optimizer step updates, and a line of `history` for every `logging_steps`-th one."""

    step: int = 0
    """Optimizer steps done so far."""
    epoch: float = 0.0
    num_label_tokens: int = 0
    """Label tokens so far."""
    num_input_tokens: int = 0
    """Non-padding tokens so far."""
    seconds: float = 0.0
    """Time spent in optimizer steps."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by phase in earlier processes of this run, each up to its last checkpoint."""
    first_loss: float = 0.0
    last_loss: float = 0.0
    peak_bytes: int = 0
    unlogged: StepReport | None = None
    """The steps since the last line of `history`, as one."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Losses, learning rates and evaluations in the format of transformers' `log_history`."""
    before: EvalReport | None = None
    """The evaluation before the first step."""
    latest: EvalReport | None = None
    best_step: int | None = None
    best_value: float | None = None
    """The best `metric_for_best_model` so far, and the step it was measured at."""

    stopped: str = ""
    """Why the run ended before its last step, when a control plugin decided so."""
    rate_factors: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate that control plugins have decided on, by plugin."""
    controls: dict[str, Any] = field(default_factory=dict)
    """What control plugins remember, by plugin; JSON values."""

    def add_step(self, report: StepReport) -> None:
        """Count an optimizer step."""
        if self.step == 0:
            self.first_loss = report.loss
        self.step, self.epoch, self.last_loss = report.step, report.epoch, report.loss
        self.num_label_tokens += report.num_label_tokens
        self.num_input_tokens += report.num_input_tokens
        self.seconds += report.seconds
        self.peak_bytes = max(self.peak_bytes, report.peak_bytes)
        self.unlogged = report if self.unlogged is None else _joined(self.unlogged, report)

    def log_steps(self) -> StepReport:
        """Add the steps since the last line to the history, and return them as one."""
        assert self.unlogged is not None
        report, self.unlogged = self.unlogged, None
        names = ("loss", "grad_norm", "learning_rate", "epoch", "step")
        self.history.append({name: getattr(report, name) for name in names} | dict(report.metrics))
        return report

    def add_evaluation(self, report: EvalReport, value: float | None, config: TrainConfig) -> bool:
        """Add an evaluation to the history; return whether `value`, its `metric_for_best_model`, is the best so far."""
        self.before = self.before or report
        self.latest = report
        named = {f"eval_{name}": number for name, number in report.metrics.items()}
        self.history.append({**named, "eval_runtime": report.seconds, "epoch": self.epoch, "step": report.step})
        if value is None or report.step == 0:
            return False
        sign = 1 if config.is_greater_better else -1
        gain = math.inf if self.best_value is None else sign * (value - self.best_value)
        if gain > 0:
            self.best_step, self.best_value = report.step, value
        return gain > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """Return the state of the values that `as_dict` returned, also in sftx 0.1, which named two otherwise."""
        renamed = with_new_names(values)
        if (num_worse := renamed.pop("num_worse", None)) is not None:  # before early stopping became a plugin
            renamed["controls"] = {"early-stopping": {"best": renamed["best_value"], "num_worse": num_worse}}
        if "wall_seconds" in renamed:  # before times were kept by phase
            renamed["phase_seconds"] = {"other": renamed.pop("wall_seconds")}
        unlogged = renamed.get("unlogged")
        return cls(
            **renamed
            | {name: _eval_report(renamed[name]) for name in ("before", "latest")}
            | {"unlogged": None if unlogged is None else StepReport(**unlogged)}
        )

    def as_trainer_state(self, config: TrainConfig, num_steps: int, checkpoints: Path) -> dict[str, Any]:
        """Return the state as transformers writes its TrainerState, for tools that read that."""
        return {
            "epoch": self.epoch,
            "global_step": self.step,
            "max_steps": num_steps,
            "logging_steps": config.logging_steps,
            "eval_steps": config.eval_steps or num_steps,
            "save_steps": config.save_steps or num_steps,
            "train_batch_size": config.micro_batch_size,
            "num_train_epochs": max(1, round(config.num_train_epochs)),
            "num_input_tokens_seen": self.num_input_tokens,
            "total_flos": 0,
            "log_history": self.history,
            "best_metric": self.best_value,
            "best_global_step": self.best_step,
            "best_model_checkpoint": None
            if self.best_step is None
            else str(checkpoint_path(checkpoints, self.best_step)),
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "is_hyper_param_search": False,
            "trial_name": None,
            "trial_params": None,
            "stateful_callbacks": {},
        }


def _joined(earlier: StepReport, last: StepReport) -> StepReport:
    """Return successive reports as one: means weighted by label tokens, sums, and the last step's values."""
    num_label_tokens = earlier.num_label_tokens + last.num_label_tokens
    share = last.num_label_tokens / num_label_tokens if num_label_tokens else 0.5

    def mean(before: float, after: float) -> float:
        return before + share * (after - before)

    return dataclasses.replace(
        last,
        loss=mean(earlier.loss, last.loss),
        num_label_tokens=num_label_tokens,
        num_input_tokens=earlier.num_input_tokens + last.num_input_tokens,
        seconds=earlier.seconds + last.seconds,
        # A metric that only some of the steps reported is the mean of these.
        metrics={
            name: mean(({**last.metrics, **earlier.metrics})[name], value)
            for name, value in {**earlier.metrics, **last.metrics}.items()
        },
    )


def _eval_report(values: Mapping[str, Any] | None) -> EvalReport | None:
    if values is None:
        return None
    losses: Mapping[str, Any] | None = values.get("token_losses")
    if losses is not None:  # tuples are lists in JSON
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in losses.items()
        }
        values = {**values, "token_losses": TokenLosses(**tuples)}
    samples = tuple(Sample(**sample) for sample in values["samples"])
    return EvalReport(**{**values, "samples": samples})
