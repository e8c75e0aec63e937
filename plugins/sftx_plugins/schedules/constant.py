"""A constant rate after warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from sftx import Schedule, hookimpl


@dataclass(frozen=True, eq=False)
class Constant:
    """Constant after warm-up."""

    @hookimpl
    def sftx_schedule(self) -> Schedule:
        return self

    def factor(self, step: int, num_steps: int) -> float:
        return 1.0
