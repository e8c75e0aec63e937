"""Muon for the matrices of the layers, and AdamW for embedding, head, vectors and stacked experts.

Muon's update is scaled to the RMS of AdamW's, so that AdamW's learning rates and weight decay suit both. (Jordan 2024,
https://kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sftx import ConfigError, OptimizerBuilder, RunInfo, TrainableParam, hookimpl, parameter_groups
from sftx_plugins.optimizers.adamw import fused_adamw

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class Muon:
    """torch's Muon for the matrices of the layers, with the momentum of train (0.95); AdamW for the rest."""

    train_options: ClassVar = ("momentum", "adam_beta1", "adam_beta2", "adam_epsilon")

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"])


class _Builder:
    state_bytes = 4.0  # 8 for what AdamW trains
    elementwise = False

    def __init__(self, train: Mapping[str, Any]) -> None:
        self._train = train

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        import torch

        hidden = [p for p in params if p.parameter.ndim == 2 and not (p.is_embedding or p.is_head)]
        if not hidden:
            raise ConfigError("option 'train.optim': muon trains the layers' matrices, and none trains here; use adamw")
        muon = torch.optim.Muon(
            parameter_groups(hidden, self._train["weight_decay"]),
            lr=self._train["learning_rate"],
            momentum=0.95 if self._train["momentum"] is None else self._train["momentum"],
            adjust_lr_fn="match_rms_adamw",
        )
        hidden_names = {param.name for param in hidden}
        others = [param for param in params if param.name not in hidden_names]
        return [muon, *(fused_adamw(self._train, others) if others else [])]
