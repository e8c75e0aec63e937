"""A `Launch` describes one launch of a Triton kernel; a GPU runs it, the static report compiles it without one.

Each kernel's module has functions that turn tensors and a `Chip` into a `Launch`. The static report passes tensors on
the meta device to the same functions, so it reports exactly what ships.
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
    """A Chip has the properties of a GPU on which a kernel's configuration may depend."""

    arch: str  # "sm_90", "gfx942"
    num_sms: int  # multiprocessors; compute units on AMD
    shared_bytes: int  # available to one program


CHIPS: Final[Mapping[str, Chip]] = {
    "sm_80": Chip("sm_80", 108, 163 * 1024),
    "sm_90": Chip("sm_90", 132, 227 * 1024),
    "sm_100": Chip("sm_100", 148, 227 * 1024),
    "gfx942": Chip("gfx942", 304, 64 * 1024),
}
"""These are the targets of the static report: A100, H100 and H200, B200, MI300X."""


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """Return the chip of a GPU. For a CPU, where Triton's interpreter runs, this is an A100."""
    if device.type == "cpu":
        return CHIPS["sm_80"]
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index)  # a tensor's device has an index
    target = driver.active.get_current_target()
    arch = f"sm_{target.arch}" if torch.version.hip is None else str(target.arch)
    return Chip(arch, properties["multiprocessor_count"], properties["max_shared_mem"])


@dataclass(frozen=True)
class Work:
    """Work is the least that a computation does: floating-point operations, and bytes moved to and from memory if each
    input is read once and each output written once."""

    flops: int
    num_bytes: int


Arguments = dict[str, Tensor | int | float | None]


@dataclass(frozen=True)
class Launch:
    """A Launch holds a kernel, its arguments in order, and how it is compiled."""

    kernel: Any  # the object that @triton.jit returns
    grid: int  # number of programs, all along x, the dimension without a practical limit
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, object]  # the tl.constexpr parameters
    num_warps: int
    num_stages: int
    work: Work
    fuses: bool = True  # a multiplication with an addition into one rounding
    uses_dot: bool = False  # the static report then expects tensor-core instructions

    def run(self) -> None:
        # enable_fp_fusion (multiply-add in one rounding) is explicit because Triton will change its default.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fuses}
        if self.grid:
            self.kernel[(self.grid,)](**self.arguments, **self.constants, **options)
