"""The schedule of MiniMind's trainers: from 1.1 times the learning rate to a tenth of it.

https://github.com/jingyaogong/minimind, get_lr in trainer/trainer_utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftx import Schedule, hookimpl
from sftx_plugins.schedules.shapes import half_cosine


@dataclass(frozen=True, eq=False)
class MiniMindSchedule:
    """The schedule of MiniMind: a tenth of the rate, and half a cosine from the rate to 0."""

    @hookimpl
    def sftx_schedule(self) -> Schedule:
        return self

    def factor(self, step: int, num_steps: int) -> float:
        return 0.1 + half_cosine(min(1.0, step / num_steps))
