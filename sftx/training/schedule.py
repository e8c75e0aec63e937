"""A step's number becomes its learning rate: a pure function, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from sftx.config import TrainConfig


def num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """`warmup_steps`, or that share of all steps when it is below 1 (rounded up, as transformers does)."""
    return math.ceil(config.warmup_steps * num_steps if config.warmup_steps < 1 else config.warmup_steps)


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0: the formulas of transformers' get_scheduler.

    Warm-up is linear from 0. Then `linear` falls to 0, `cosine` falls along half a cosine to 0, `constant` stays.
    """
    warmup = num_warmup_steps(config, num_steps)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1.0 - progress)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate
