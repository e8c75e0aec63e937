"""One launch of a Triton kernel: what the GPU is asked to do, and what the static report compiles with no GPU.

A kernel's module has functions that turn tensors and a `Chip` into a `Launch`. On a GPU the launch is run. For
the static report the same functions get tensors on the meta device, so that what is reported is what is shipped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chip:
    """What the configuration of a kernel may depend on."""

    arch: str  # "sm_90", "gfx942"
    num_sms: int  # multiprocessors; compute units on AMD
    shared_bytes: int  # that one program may take


CHIPS: Final[Mapping[str, Chip]] = {
    "sm_80": Chip("sm_80", 108, 163 * 1024),
    "sm_90": Chip("sm_90", 132, 227 * 1024),
    "sm_100": Chip("sm_100", 148, 227 * 1024),
    "gfx942": Chip("gfx942", 304, 64 * 1024),
}
"""The targets of the static report: A100, H100 and H200, B200, MI300X."""


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a GPU; on a CPU, where Triton's interpreter runs, an A100's numbers."""
    if device.type == "cpu":
        return CHIPS["sm_80"]
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index)  # a tensor's device has one
    target = driver.active.get_current_target()
    arch = f"sm_{target.arch}" if torch.version.hip is None else str(target.arch)
    return Chip(arch, properties["multiprocessor_count"], properties["max_shared_mem"])


@dataclass(frozen=True)
class Work:
    """What a launch cannot do without: floating-point operations, and bytes between the chip and its memory
    when each input is read once and each output written once."""

    flops: int
    num_bytes: int


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments in order, and how it is compiled."""

    kernel: Any  # what @triton.jit makes
    grid: int  # programs; the grid lies on x, whose size has no limit that matters
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, object]  # the tl.constexpr parameters
    num_warps: int
    num_stages: int
    work: Work
    uses_dot: bool = False  # so that the static report asks for tensor-core instructions

    @property
    def options(self) -> dict[str, Any]:
        """How Triton compiles it. Multiply-add in one rounding is said out loud, for its default is to change."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        if self.grid:
            self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)
