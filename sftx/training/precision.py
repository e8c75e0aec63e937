"""The machine and the options become a device and the dtypes of a run."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

from sftx.config import TrainConfig
from sftx.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """Where and in what numbers a run computes.

    With bf16, matrix products run in bfloat16 under autocast. What trains is fp32 always: adapters, or the whole model
    when there is none; a frozen base is kept in bfloat16.
    """

    device: torch.device
    bf16: bool

    def base_dtype(self, *, frozen: bool) -> torch.dtype:
        return torch.bfloat16 if self.bf16 and frozen else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def __str__(self) -> str:
        return "bfloat16 (autocast)" if self.bf16 else "float32"


def choose(config: TrainConfig) -> Precision:
    """Raises ConfigError when bf16 is asked of a GPU that lacks it."""
    device = torch.device("cpu" if config.use_cpu or not torch.cuda.is_available() else "cuda")
    able = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if config.bf16 and not able:
        raise ConfigError("option 'train.bf16': this GPU has no bfloat16; leave it out")
    return Precision(device, config.bf16 if config.bf16 is not None else device.type == "cuda" and able)


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: the device's where there is a GPU, resident memory of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
