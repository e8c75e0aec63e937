"""Chooses the device and the dtypes of a run from the options and the hardware, and measures peak memory."""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from sftx.checkpoint.layout import NO_FP32_COPY
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError
from sftx_kernels import cpu_multiplies

_DEFAULT: Final = "SFTX_BF16"
"""The environment variable that, set to 0, makes float32 the default of a CPU that multiplies bfloat16 faster."""


@dataclass(frozen=True)
class Precision:
    """Holds the device and the dtypes of a run.

    In bf16 or fp16, matrix products run in `dtype` under autocast. Trained parameters are fp32, whether adapters or the
    whole model; the frozen base of adapters is kept in `dtype`. With `low_precision_weights` (an optimizer such
    as adamw_bf16) a model that is trained as a whole is kept in `dtype` too.
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool = False
    low_precision_weights: bool = False
    reason: str = ""
    """Why this dtype was chosen, where no option says so."""

    def base_dtype(self, *, frozen: bool) -> torch.dtype:
        """Returns the dtype in which the model is loaded; `frozen` when only adapters are trained."""
        return self.dtype if frozen or self.low_precision_weights else torch.float32

    def autocast(self) -> torch.autocast:
        """Returns the autocast context of a forward pass, which does nothing in fp32."""
        is_enabled = self.dtype != torch.float32
        # Autocast's cache is off: it keeps a copy of every weight in `dtype` until the forward pass ends, also for
        # recomputed layers. That costs 2 bytes per parameter, and every weight is used once.
        return torch.autocast(
            self.device.type, dtype=self.dtype if is_enabled else None, enabled=is_enabled, cache_enabled=False
        )

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Returns the loss scaler that keeps fp16 gradients in range, which does nothing in other dtypes."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        details = [] if self.dtype == torch.float32 else ["autocast"]
        details += ["loss scaled"] if self.dtype == torch.float16 else []
        details += [NO_FP32_COPY] if self.low_precision_weights else []
        details += ["products in tf32"] if self.tf32 else []
        return f"{name} ({', '.join(details)})" if details else name


def choose(config: TrainConfig, local_rank: int = 0, *, bf16_weights: bool = False) -> Precision:
    """Chooses device and dtypes, and sets TF32 for the process; `local_rank` is the index of the GPU, if there is one.

    `bf16_weights`: whether the optimizer trains a model whose weights are bfloat16.

    Raises ConfigError when the options contradict each other, when this GPU does not support bf16, or when the
    environment variable SFTX_BF16 has a value without a meaning.
    """
    on_cpu = config.use_cpu or not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    if bf16_weights and (config.fp16 or config.bf16 is False):
        conflicting = "fp16" if config.fp16 else "bf16: false"
        raise ConfigError(
            f"option 'train.optim': {config.optim} keeps weights in bfloat16, which {conflicting} excludes; "
            "leave one out"
        )
    supports_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if not supports_bf16 and (config.bf16 or bf16_weights):
        option = "bf16" if config.bf16 else f"optim: {config.optim}"
        raise ConfigError(f"option 'train.{option}': this GPU does not support bfloat16; leave it out, or set fp16")
    by_itself = config.bf16 is None and not config.fp16 and not bf16_weights
    is_default = supports_bf16 if device.type == "cuda" else not _asks_for_float32() and bf16_is_faster()
    bf16 = is_default if by_itself else bf16_weights or bool(config.bf16)
    dtype = torch.float16 if config.fp16 else torch.bfloat16 if bf16 else torch.float32
    set_tf32(device, enabled=config.tf32)
    reason = ""
    if by_itself and device.type == "cpu":
        reason = "which this CPU has instructions for" if bf16 else _reason_against_bf16()
    return Precision(device, dtype, config.tf32 and device.type == "cuda", bf16_weights, reason)


@functools.cache
def _cpu_has_bf16() -> bool:
    """Return whether this CPU has instructions for products in bfloat16: AMX, AVX-512 BF16, or Arm's BF16."""
    if _is_arm():
        return bool(re.search(r"^Features.*\bbf16\b", _description_of_cpu(), re.MULTILINE))
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_multiplies(torch.bfloat16)


@functools.cache
def bf16_is_faster() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32.

    One with AMX does (4 to 11 times as fast where it was measured), and an AMD EPYC of the Zen 4 kind with AVX-512 BF16
    (2.1 times). An Intel CPU with AVX-512 BF16 and without AMX, which a virtual machine may hide, has half the rate of
    float32: 175 and 340 GFLOP/s on two cores of an Emerald Rapids, torch 2.13. Arm's BF16 is taken to be faster, which
    was not measured.
    """
    if not _cpu_has_bf16():
        return False
    return _is_arm() or torch.cpu._is_amx_tile_supported() or "GenuineIntel" not in _description_of_cpu()


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _description_of_cpu() -> str:
    """Return what the system says of the processor: its maker's name and, on Linux, the names of its instructions."""
    information = Path("/proc/cpuinfo")
    return information.read_text(encoding="utf-8") if information.exists() else platform.processor()


def _asks_for_float32() -> bool:
    value = os.environ.get(_DEFAULT, "")
    if value not in ("", "0"):
        raise ConfigError(
            f"environment variable {_DEFAULT}={value}: expected 0, which makes float32 the default of a CPU, or "
            "nothing; `--bf16` and `--no-bf16` choose for one run"
        )
    return value == "0"


def _reason_against_bf16() -> str:
    if not _cpu_has_bf16():
        return "as this CPU has no instructions for bfloat16"
    return f"as {_DEFAULT}=0 asks for" if bf16_is_faster() else "which this CPU multiplies faster than bfloat16"


def set_tf32(device: torch.device, *, enabled: bool) -> None:
    """Sets whether a GPU multiplies fp32 matrices in TF32, for the process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if enabled else "ieee"


def peak_bytes(device: torch.device) -> int:
    """Returns the peak memory so far: of the GPU as torch allocated it, otherwise the peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if match is not None:  # Linux, where getrusage() also counts the memory of the parent process before exec()
        return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has no such module
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
