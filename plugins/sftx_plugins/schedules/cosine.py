"""The default schedule: half a cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sftx import RunInfo, Schedule, hookimpl
from sftx_plugins.schedules.shapes import Falling, half_cosine


@dataclass(frozen=True, eq=False)
class Cosine:
    """Half a cosine, down to min_lr_ratio of the peak."""

    train_options: ClassVar = ("min_lr_ratio",)

    @hookimpl
    def sftx_schedule(self, run: RunInfo) -> Schedule:
        return Falling(half_cosine, run.config["train"]["min_lr_ratio"])
