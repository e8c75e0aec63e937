"""The counters of a run and what it has reported: all of its state that is neither weights, optimizer nor data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftx.config.options import TrainConfig
from sftx.events import EvalReport, Sample, StepReport, TokenLosses


@dataclass
class RunState:
    """Grows with every step by numbers alone, and with every `logging_steps`-th by a line of `history`."""

    step: int = 0
    """Steps that are done."""
    epoch: float = 0.0
    num_label_tokens: int = 0
    """Trained tokens so far."""
    num_input_tokens: int = 0
    seconds: float = 0.0
    """In steps."""
    wall_seconds: float = 0.0
    """Of earlier processes of this run, up to their last checkpoints."""
    first_loss: float = 0.0
    last_loss: float = 0.0
    peak_bytes: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Losses, rates and evaluations in the form of transformers' `log_history`."""
    before: EvalReport | None = None
    """The evaluation before the first step."""
    latest: EvalReport | None = None
    best_step: int | None = None
    best_value: float | None = None
    num_worse: int = 0
    """Evaluations in a row that were not better by `early_stopping_threshold`."""

    def add_step(self, report: StepReport, *, logged: bool) -> None:
        if self.step == 0:
            self.first_loss = report.loss
        self.step, self.epoch, self.last_loss = report.step, report.epoch, report.loss
        self.num_label_tokens += report.num_label_tokens
        self.num_input_tokens += report.num_input_tokens
        self.seconds += report.seconds
        self.peak_bytes = max(self.peak_bytes, report.peak_bytes)
        if logged:
            names = ("loss", "grad_norm", "learning_rate", "epoch", "step")
            self.history.append({name: getattr(report, name) for name in names} | dict(report.metrics))

    def add_evaluation(self, report: EvalReport, value: float | None, config: TrainConfig) -> bool:
        """Returns whether `value`, that of `metric_for_best_model`, is the best so far."""
        self.before = self.before or report
        self.latest = report
        named = {f"eval_{name}": number for name, number in report.metrics.items()}
        self.history.append({**named, "eval_runtime": report.seconds, "epoch": self.epoch, "step": report.step})
        if value is None or report.step == 0:
            return False
        sign = 1 if config.is_greater_better else -1
        gain = math.inf if self.best_value is None else sign * (value - self.best_value)
        self.num_worse = 0 if gain > config.early_stopping_threshold else self.num_worse + 1
        if gain > 0:
            self.best_step, self.best_value = report.step, value
        return gain > 0

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> RunState:
        """What `as_dict` gave."""
        return cls(**values | {name: _report(values[name]) for name in ("before", "latest")})

    def as_trainer_state(self, config: TrainConfig, num_steps: int, checkpoints: Path) -> dict[str, Any]:
        """As transformers' TrainerState is written, for the tools that read it."""
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
            "best_model_checkpoint": None if self.best_step is None else str(checkpoints / f"step-{self.best_step}"),
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "is_hyper_param_search": False,
            "trial_name": None,
            "trial_params": None,
            "stateful_callbacks": {},
        }


def _report(values: dict[str, Any] | None) -> EvalReport | None:
    if values is None:
        return None
    losses = values.get("token_losses")
    shown = None if losses is None else TokenLosses(**{name: _tuple(value) for name, value in losses.items()})
    samples = tuple(Sample(**sample) for sample in values["samples"])
    return EvalReport(**values | {"samples": samples, "token_losses": shown})


def _tuple(value: Any) -> Any:
    """JSON has lists alone."""
    return tuple(value) if isinstance(value, list) else value
