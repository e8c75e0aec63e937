"""A step's number becomes its learning rate: a pure function, so that a resumed run needs no state for it.

A schedule is a shape over progress, which goes from 0 after warm-up to 1 at the end of the run. The formulas are those
of transformers' get_scheduler; `minimind` is that of MiniMind's trainers (https://github.com/jingyaogong/minimind,
get_lr in trainer/trainer_utils.py), which begins at 1.1 times the rate and ends at a tenth of it.
"""

from __future__ import annotations

import math

from sftx.config.options import TrainConfig


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """`warmup_steps`, or that share of all steps when it is below 1 (rounded up, as transformers does)."""
    return _steps(config.warmup_steps, num_steps)


def num_decay_steps(config: TrainConfig, num_steps: int) -> int:
    """The last steps of warmup_stable_decay, which decay: `lr_decay_steps`, as far as warm-up leaves room for them."""
    return min(_steps(config.lr_decay_steps, num_steps), max(0, num_steps - num_warmup_steps(config, num_steps)))


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Warm-up is linear from 0 to where the shape begins. Then the rate falls to `min_lr_ratio` of its peak, except that
    `constant` stays and `minimind` has a floor of its own; past `num_steps` it stays where it ended.
    """
    warmup = num_warmup_steps(config, num_steps)
    if step >= warmup:
        return config.learning_rate * _shape(config, step - warmup, num_steps - warmup, num_steps)
    risen = step / warmup
    if config.lr_scheduler_type == "warmup_stable_decay":  # transformers' begins at the floor, not at 0
        risen = _above(config.min_lr_ratio, risen)
    return config.learning_rate * risen * _shape(config, 0, num_steps - warmup, num_steps)


def _steps(value: float, num_steps: int) -> int:
    return math.ceil(value * num_steps if value < 1 else value)


def _shape(config: TrainConfig, step: int, length: int, num_steps: int) -> float:
    """The share of the peak rate after `step` of the `length` steps that follow warm-up."""
    progress = min(1.0, step / max(1, length))
    match config.lr_scheduler_type:
        case "constant":
            return 1.0
        case "minimind":
            return 0.1 + _half_cosine(progress)
        case "linear":
            share = 1.0 - progress
        case "polynomial":
            share = (1.0 - progress) ** config.lr_power
        case "cosine":
            share = _half_cosine(progress)
        case _:  # warmup_stable_decay
            share = _decay(config, step, length, num_decay_steps(config, num_steps))
    return _above(config.min_lr_ratio, share)


def _decay(config: TrainConfig, step: int, length: int, num_decay: int) -> float:
    """1 until the last `num_decay` steps, which fall to 0."""
    done = step - (length - num_decay)
    if done < 0:
        return 1.0
    progress = min(1.0, done / num_decay) if num_decay else 1.0
    match config.lr_decay_type:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return _half_cosine(progress)
        case "1-sqrt":
            return 1.0 - math.sqrt(progress)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _above(floor: float, share: float) -> float:
    """A share of what lies between the floor and 1, on top of the floor."""
    return share * (1.0 - floor) + floor
