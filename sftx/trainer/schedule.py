"""The learning rate of each step, a pure function of the step: a resumed run needs no scheduler state.

Warm-up is that of transformers' get_scheduler; what follows it is a plugin's.
"""

from __future__ import annotations

import itertools
import math

from sftx.assembly.stages.optimizer_stages import ScheduleStage
from sftx.config.options import TrainConfig


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Return `warmup_steps`; below 1 it is a fraction of all steps, rounded up as transformers does."""
    value = config.warmup_steps
    return math.ceil(value * num_steps if value < 1 else value)


def learning_rate(schedule: ScheduleStage, config: TrainConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, in a run of `num_steps`.

    Warm-up is linear from 0, or from the schedule's `warmup_start`, to the first value of the schedule.
    """
    warmup = num_warmup_steps(config, num_steps)
    num_after = max(1, num_steps - warmup)
    if step >= warmup:
        return config.learning_rate * schedule.factor(step - warmup, num_after)
    warmup_factor: float = step / warmup * (1.0 - schedule.warmup_start) + schedule.warmup_start
    return config.learning_rate * warmup_factor * schedule.factor(0, num_after)


def num_steps_at_zero(schedule: ScheduleStage, config: TrainConfig, num_steps: int) -> int:
    """Return the number of steps whose learning rate is 0, in which nothing is trained.

    Warm-up begins at 0 in its first step, as in transformers. Only zeros at the start and at the end are counted.
    """
    rates = (learning_rate(schedule, config, step, num_steps) for step in range(num_steps))
    at_start = sum(1 for _ in itertools.takewhile(lambda rate: rate == 0, rates))
    if at_start == num_steps:
        return num_steps
    from_end = (learning_rate(schedule, config, step, num_steps) for step in reversed(range(num_steps)))
    return at_start + sum(1 for _ in itertools.takewhile(lambda rate: rate == 0, from_end))
