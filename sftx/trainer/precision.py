"""The machine and the options become a device and the dtypes of a run."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sftx.config.optimizers import OPTIMIZERS
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """Where and in what numbers a run computes.

    With bf16 or fp16, matrix products run in it under autocast. What trains is fp32: adapters, or the whole model when
    there is none; a frozen base is kept in the narrow dtype. `narrow_weights`: a model that trains as a whole is too.
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool = False
    narrow_weights: bool = False

    def base_dtype(self, *, frozen: bool) -> torch.dtype:
        return self.dtype if frozen or self.narrow_weights else torch.float32

    def autocast(self) -> torch.autocast:
        narrow = self.dtype != torch.float32
        # Without autocast's cache, which keeps a narrow copy of every weight until the forward is over, also of layers
        # that are computed again: 2 bytes a parameter, for weights that are used once.
        return torch.autocast(
            self.device.type, dtype=self.dtype if narrow else None, enabled=narrow, cache_enabled=False
        )

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Keeps gradients within float16's range, where that is the dtype; else it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        details = [] if self.dtype == torch.float32 else ["autocast"]
        details += ["loss scaled"] if self.dtype == torch.float16 else []
        details += ["no fp32 copy of weights"] if self.narrow_weights else []
        details += ["products in tf32"] if self.tf32 else []
        return f"{name} ({', '.join(details)})" if details else name


def choose(config: TrainConfig, local_rank: int = 0) -> Precision:
    """Also switches TF32. `local_rank`: the number of the GPU, where there are any.

    Raises ConfigError when the options exclude each other, or this GPU lacks bf16."""
    on_cpu = config.use_cpu or not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    narrow_weights = OPTIMIZERS[config.optim].bf16_weights
    if narrow_weights and (config.fp16 or config.bf16 is False):
        asked = "fp16" if config.fp16 else "bf16: false"
        raise ConfigError(
            f"option 'train.optim': {config.optim} keeps weights in bfloat16, which {asked} excludes; leave one out"
        )
    able = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if not able and (config.bf16 or narrow_weights):
        option = "bf16" if config.bf16 else f"optim: {config.optim}"
        raise ConfigError(f"option 'train.{option}': this GPU has no bfloat16; leave it out, or set fp16")
    by_default = narrow_weights or (device.type == "cuda" and able)
    bf16 = not config.fp16 and (by_default if config.bf16 is None else config.bf16)
    dtype = torch.float16 if config.fp16 else torch.bfloat16 if bf16 else torch.float32
    tf32 = config.tf32 and device.type == "cuda"
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    return Precision(device, dtype, tf32, narrow_weights)


def peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: the device's where there is a GPU, resident memory of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found is not None:  # Linux, whose getrusage() counts what this process was before exec() as well: its parent
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
