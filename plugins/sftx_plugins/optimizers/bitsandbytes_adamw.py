"""AdamW of bitsandbytes, with 8-bit state, paged state or both.

The state of the embedding stays in 32 bits, as the authors advise: few of its rows get a gradient in a step.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sftx import ConfigError, OptimizerBuilder, RunInfo, TrainableParam, hookimpl, parameter_groups
from sftx_plugins.optimizers.options import ADAM_OPTIONS, adam_options

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class AdamW8bit:
    """bitsandbytes' AdamW with 8-bit state; that of the embedding stays in 32 bits."""

    train_options: ClassVar = ADAM_OPTIONS

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"], "adamw_8bit", has_8bit_state=True)


@dataclass(frozen=True, eq=False)
class PagedAdamW:
    """bitsandbytes' AdamW with state that is paged to host memory; needs a GPU."""

    train_options: ClassVar = ADAM_OPTIONS

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"], "paged_adamw", is_paged=True)


@dataclass(frozen=True, eq=False)
class PagedAdamW8bit:
    """bitsandbytes' AdamW with 8-bit state that is paged to host memory; needs a GPU."""

    train_options: ClassVar = ADAM_OPTIONS

    @hookimpl
    def sftx_optimizer(self, run: RunInfo) -> OptimizerBuilder:
        return _Builder(run.config["train"], "paged_adamw_8bit", is_paged=True, has_8bit_state=True)


class _Builder:
    elementwise = False

    def __init__(
        self, train: Mapping[str, Any], name: str, *, is_paged: bool = False, has_8bit_state: bool = False
    ) -> None:
        self._train = train
        self._name = name
        self._has_8bit_state = has_8bit_state
        self.needs_gpu = is_paged
        self.state_bytes = 2.0 if has_8bit_state else 8.0

    def build(self, params: Sequence[TrainableParam]) -> Sequence[Optimizer]:
        if self.needs_gpu and params[0].parameter.device.type != "cuda":
            raise ConfigError(
                f"option 'train.optim': {self._name} needs a GPU, whose memory it pages; use "
                f"{self._name.removeprefix('paged_')}"
            )
        try:
            library = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ConfigError(
                f"option 'train.optim': {self._name} is from bitsandbytes, which cannot be imported "
                f"({' '.join(str(error).split())}); pip install bitsandbytes, or use adamw"
            ) from error
        class_name = "PagedAdamW" if self.needs_gpu else "AdamW"
        in_8_bits = [param for param in params if self._has_8bit_state and not param.is_embedding]
        in_32_bits = [param for param in params if not (self._has_8bit_state and not param.is_embedding)]
        return [
            getattr(library, name)(parameter_groups(chosen, self._train["weight_decay"]), **adam_options(self._train))
            for name, chosen in ((f"{class_name}8bit", in_8_bits), (class_name, in_32_bits))
            if chosen
        ]
