"""The reciprocal square root schedule with a cooldown (Zhai et al. 2022, https://arxiv.org/abs/2106.04560, B.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import Schedule, hookimpl

__all__ = ["ReciprocalSquareRoot"]


@dataclass(frozen=True, eq=False)
class ReciprocalSquareRoot:
    """Falls with the square root of the step, and linearly to 0 in the last steps of the run."""

    timescale: Annotated[int, Field(ge=1, description="Steps that warm-up counts as, where it has fewer.")] = 10
    cooldown: Annotated[float, Field(ge=0, le=1, description="Share of all steps in which the rate falls to 0.")] = 0.25

    @hookimpl
    def sftx_schedule(self, num_warmup_steps: int, num_training_steps: int) -> Schedule:
        return Falling(max(num_warmup_steps, self.timescale), math.ceil(self.cooldown * num_training_steps))


@dataclass(frozen=True)
class Falling:
    timescale: int
    num_cooldown: int

    def factor(self, step: int, num_steps: int) -> float:
        left = max(0, num_steps - step)
        cooled = min(1.0, left / self.num_cooldown) if self.num_cooldown else 1.0
        return cooled * math.sqrt(self.timescale / (self.timescale + step))
