"""A constant rate that decays in the last steps of the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from sftx import RunInfo, Schedule, hookimpl
from sftx_plugins.schedules.shapes import half_cosine, linear, rescale

log = logging.getLogger(__name__)

_SHAPES: Final[Mapping[str, Callable[[float], float]]] = {
    "linear": linear,
    "cosine": half_cosine,
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


@dataclass(frozen=True, eq=False)
class WarmupStableDecay:
    """Constant, then lr_decay_steps of lr_decay_type, down to min_lr_ratio of the peak, where warm-up begins too."""

    train_options: ClassVar = ("min_lr_ratio", "lr_decay_steps", "lr_decay_type")

    @hookimpl
    def sftx_schedule(self, num_warmup_steps: int, num_training_steps: int, run: RunInfo) -> Schedule:
        train = run.config["train"]
        decay: float = train["lr_decay_steps"]  # below 1 it is a share of all steps
        num_decay = math.ceil(decay * num_training_steps if decay < 1 else decay)
        num_decay = min(num_decay, max(0, num_training_steps - num_warmup_steps))
        if num_warmup_steps + num_decay >= num_training_steps:
            log.warning(
                "%d steps of warm-up and %d of decay leave no level part of %d",
                num_warmup_steps, num_decay, num_training_steps,
            )  # fmt: skip
        return Level(num_decay, _SHAPES[train["lr_decay_type"]], train["min_lr_ratio"])


@dataclass(frozen=True)
class Level:
    """1 before the last `num_decay` steps, in which the factor falls by a shape."""

    num_decay: int
    shape: Callable[[float], float]
    warmup_start: float
    """Of the peak; also where the decay ends."""

    def factor(self, step: int, num_steps: int) -> float:
        num_decayed = step - (num_steps - self.num_decay)
        if num_decayed < 0:
            return rescale(1.0, self.warmup_start)
        progress = min(1.0, num_decayed / self.num_decay) if self.num_decay else 1.0
        return rescale(self.shape(progress), self.warmup_start)
