"""Lion, which updates by the sign of a momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sftx import OptimizerBuilder, RunInfo, TrainableParam, hookimpl, parameter_groups
from sftx_plugins.optimizers.options import betas

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class Lion:
    """Lion (Chen et al. 2023), with adam_beta1 and adam_beta2 (0.99); wants a third to a tenth of AdamW's rate."""

    train_options: ClassVar = ("adam_beta1", "adam_beta2")

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"])


class _Builder:
    state_bytes = 4.0
    elementwise = True

    def __init__(self, train: Mapping[str, Any]) -> None:
        self._train = train

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        from sftx_plugins.optimizers.foreach_optimizers import Lion

        groups = parameter_groups(params, self._train["weight_decay"])
        # The default of its authors.
        return [Lion(groups, lr=self._train["learning_rate"], betas=betas(self._train, default_beta2=0.99))]
