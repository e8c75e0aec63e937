"""A power of a linear decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sftx import RunInfo, Schedule, hookimpl
from sftx_plugins.schedules.shapes import Falling, linear


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A power, lr_power, of a linear decay, down to min_lr_ratio of the peak."""

    train_options: ClassVar = ("min_lr_ratio", "lr_power")

    @hookimpl
    def sftx_schedule(self, run: RunInfo) -> Schedule:
        train = run.config["train"]
        power: float = train["lr_power"]
        return Falling(lambda progress: linear(progress) ** power, train["min_lr_ratio"])
