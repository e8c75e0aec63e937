"""Stochastic gradient descent, with momentum if it is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sftx import OptimizerBuilder, RunInfo, TrainableParam, hookimpl, parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class SGD:
    """Stochastic gradient descent with decoupled weight decay, and the momentum of train (0)."""

    train_options: ClassVar = ("momentum",)

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"])


class _Builder:
    elementwise = True

    def __init__(self, train: Mapping[str, Any]) -> None:
        self._train = train
        self._momentum = train["momentum"] or 0.0
        self.state_bytes = 4.0 if self._momentum else 0.0

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        from sftx_plugins.optimizers.foreach_optimizers import SGD

        groups = parameter_groups(params, self._train["weight_decay"])
        return [SGD(groups, lr=self._train["learning_rate"], momentum=self._momentum)]
