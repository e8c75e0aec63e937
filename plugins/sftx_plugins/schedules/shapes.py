"""Shapes that several schedules fall by, as functions of progress from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1.0 - progress


def rescale(factor: float, minimum: float) -> float:
    """Map a factor in [0, 1] linearly to [minimum, 1]."""
    return factor * (1.0 - minimum) + minimum


@dataclass(frozen=True)
class Falling:
    """A schedule that falls by a shape, from the peak after warm-up to `minimum` of it at the last step."""

    shape: Callable[[float], float]
    minimum: float

    def factor(self, step: int, num_steps: int) -> float:
        return rescale(self.shape(min(1.0, step / num_steps)), self.minimum)
