"""Adafactor, whose second moment is factored: hardly any state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftx import OptimizerBuilder, RunInfo, TrainableParam, hookimpl, parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class Adafactor:
    """transformers' Adafactor, with the settings of its Trainer."""

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"])


class _Builder:
    state_bytes = 0.1  # 4 (rows + columns) bytes for a matrix
    elementwise = False

    def __init__(self, train: Mapping[str, Any]) -> None:
        self._train = train

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        """Make Adafactor as transformers' Trainer does: the schedule sets the rate, an update's RMS is at most 1, and
        there is no first moment.

        torch's Adafactor always multiplies the rate by the RMS of the parameter itself: LoRA's B, which starts as zero,
        would move by a thousandth of the rate, and rates that suit AdamW would train nothing.
        """
        from transformers.optimization import Adafactor

        groups = parameter_groups(params, self._train["weight_decay"])
        return [Adafactor(groups, lr=self._train["learning_rate"], scale_parameter=False, relative_step=False)]
