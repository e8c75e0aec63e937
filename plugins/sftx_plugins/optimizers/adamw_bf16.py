"""AdamW for weights in bfloat16 that loses no update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sftx import ConfigError, OptimizerBuilder, RunInfo, TrainableParam, hookimpl, parameter_groups
from sftx_plugins.optimizers.options import ADAM_OPTIONS, adam_options

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class AdamWBf16:
    """AdamW for weights in bfloat16; the bits of each fp32 weight that bfloat16 lacks are optimizer state."""

    train_options: ClassVar = ADAM_OPTIONS

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"])


class _Builder:
    # First moment and low bits of the weight 2 bytes each, second moment 4. FSDP's shards are untested with it.
    state_bytes = 8.0
    elementwise = False
    bf16_weights = True

    def __init__(self, train: Mapping[str, Any]) -> None:
        self._train = train

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        import torch

        from sftx_plugins.optimizers.split_adamw import SplitAdamW

        wrong = next((param for param in params if param.parameter.dtype != torch.bfloat16), None)
        if wrong is not None:
            raise ConfigError(
                "option 'train.optim': adamw_bf16 is for full fine-tuning with bf16, whose weights it keeps in "
                f"bfloat16; {wrong.name} trains in {str(wrong.parameter.dtype).removeprefix('torch.')}; use adamw"
            )
        return [SplitAdamW(parameter_groups(params, self._train["weight_decay"]), **adam_options(self._train))]
