"""Cautious AdamW (Liang et al. 2024, https://arxiv.org/abs/2411.16085): no element moves against its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from sftx import OptimizerBuilder, RunInfo, TrainableParam, hookimpl, parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["CautiousAdamW"]


@dataclass(frozen=True, eq=False)
class CautiousAdamW:
    """AdamW without the elements of an update whose sign is not that of the gradient."""

    train_options: ClassVar = ("adam_beta1", "adam_beta2", "adam_epsilon")

    least: Annotated[float, Field(gt=0, le=1, description="Least share of elements that an update is scaled by.")] = 0.1

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return Builder(run.config["train"], self.least)


@dataclass(frozen=True)
class Builder:
    train: Mapping[str, Any]
    least: float
    state_bytes = 8.0
    elementwise = False  # the update is scaled by a mean over the parameter

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        from sftx_cautious.cautious import Cautious

        beta2 = self.train["adam_beta2"]
        return [
            Cautious(
                parameter_groups(params, self.train["weight_decay"]),
                lr=self.train["learning_rate"],
                betas=(self.train["adam_beta1"], 0.999 if beta2 is None else beta2),
                eps=self.train["adam_epsilon"],
                least=self.least,
            )
        ]
