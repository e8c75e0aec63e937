"""Learning-rate schedules, as pure functions of the step: a resumed run needs no scheduler state.

The formulas are those of transformers' get_scheduler. `minimind` is that of MiniMind's trainers
(https://github.com/jingyaogong/minimind, get_lr in trainer/trainer_utils.py), which begins at 1.1 times the learning
rate and ends at a tenth of it.
"""

from __future__ import annotations

import itertools
import math

from sftx.config.options import TrainConfig


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Returns `warmup_steps`; below 1 it is a fraction of all steps, rounded up as transformers does."""
    return _resolve(config.warmup_steps, num_steps)


def num_decay_steps(config: TrainConfig, num_steps: int) -> int:
    """Returns the number of decay steps at the end of warmup_stable_decay: at most those that warm-up leaves."""
    return min(_resolve(config.lr_decay_steps, num_steps), max(0, num_steps - num_warmup_steps(config, num_steps)))


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0.

    Warm-up is linear from 0 to the first value of the schedule. Then the rate falls to `min_lr_ratio` of its peak,
    except that `constant` does not fall and `minimind` has a minimum of its own. After `num_steps` it stays the same.
    """
    warmup = num_warmup_steps(config, num_steps)
    if step >= warmup:
        return config.learning_rate * _factor(config, step - warmup, num_steps - warmup, num_steps)
    warmup_factor = step / warmup
    if config.lr_scheduler_type == "warmup_stable_decay":  # transformers' begins at the minimum, not at 0
        warmup_factor = _rescale(warmup_factor, config.min_lr_ratio)
    return config.learning_rate * warmup_factor * _factor(config, 0, num_steps - warmup, num_steps)


def num_steps_at_zero(config: TrainConfig, num_steps: int) -> int:
    """Returns the number of steps whose learning rate is 0, in which nothing is trained.

    Warm-up begins at 0 in its first step, as in transformers. Rates rise and then fall, so that zeros are at the ends.
    """
    rates = (learning_rate(config, step, num_steps) for step in range(num_steps))
    at_start = sum(1 for _ in itertools.takewhile(lambda rate: rate == 0, rates))
    if at_start == num_steps:
        return num_steps
    from_end = (learning_rate(config, step, num_steps) for step in reversed(range(num_steps)))
    return at_start + sum(1 for _ in itertools.takewhile(lambda rate: rate == 0, from_end))


def _resolve(value: float, num_steps: int) -> int:
    return math.ceil(value * num_steps if value < 1 else value)


def _factor(config: TrainConfig, step: int, num_after_warmup: int, num_steps: int) -> float:
    """Returns the factor of the peak rate at `step`, counted from the end of warm-up, of `num_after_warmup` steps."""
    progress = min(1.0, step / max(1, num_after_warmup))
    match config.lr_scheduler_type:
        case "constant":
            return 1.0
        case "minimind":
            return 0.1 + _half_cosine(progress)
        case "linear":
            factor = 1.0 - progress
        case "polynomial":
            factor = (1.0 - progress) ** config.lr_power
        case "cosine":
            factor = _half_cosine(progress)
        case _:  # warmup_stable_decay
            factor = _decay(config, step, num_after_warmup, num_decay_steps(config, num_steps))
    return _rescale(factor, config.min_lr_ratio)


def _decay(config: TrainConfig, step: int, num_after_warmup: int, num_decay: int) -> float:
    """Returns 1 before the last `num_decay` steps, in which the factor falls to 0."""
    num_decayed = step - (num_after_warmup - num_decay)
    if num_decayed < 0:
        return 1.0
    progress = min(1.0, num_decayed / num_decay) if num_decay else 1.0
    match config.lr_decay_type:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return _half_cosine(progress)
        case "1-sqrt":
            return 1.0 - math.sqrt(progress)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _rescale(factor: float, minimum: float) -> float:
    """Maps a factor in [0, 1] linearly to [minimum, 1]."""
    return factor * (1.0 - minimum) + minimum
