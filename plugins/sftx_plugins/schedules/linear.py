"""A linear decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sftx import RunInfo, Schedule, hookimpl
from sftx_plugins.schedules.shapes import Falling, linear


@dataclass(frozen=True, eq=False)
class Linear:
    """Linear, down to min_lr_ratio of the peak."""

    train_options: ClassVar = ("min_lr_ratio",)

    @hookimpl
    def sftx_schedule(self, run: RunInfo) -> Schedule:
        return Falling(linear, run.config["train"]["min_lr_ratio"])
