"""What the chips of the static report can do: how many programs fit a multiprocessor, and how fast the device is.

Occupancy is counted as in NVIDIA's occupancy calculator: registers are given out by the warp in units of 256, shared
memory by the program in units of 128 bytes on top of 1 KB that the system keeps for each program (sm_80 and later);
limits from the CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". On AMD a wave of
64 threads takes vector registers in units of 8 out of 512 a SIMD, and LDS in units of 512 bytes; limits from the
CDNA3 ISA guide and LLVM's AMDGPUBaseInfo.cpp (gfx942).

Peaks are those of the vendors' data sheets for the SXM or OAM modules, dense: bf16 through tensor cores, fp32
without them, and the bandwidth of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from sftx_kernels.bench.devices import DATA_SHEETS


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one multiprocessor (a compute unit on AMD)."""

    warps: int
    programs: int
    schedulers: int  # registers are split evenly among them
    registers: int  # 32 bits wide and one for each thread of a warp: how many a scheduler has
    register_unit: int  # given out by so many
    shared_bytes: int
    shared_unit: int
    shared_reserved: int  # kept by the system for each program
    tensor_memory: int = 0  # columns of the fifth generation's tensor memory


class Occupancy(NamedTuple):
    programs: int  # that one multiprocessor holds at once
    warps: int
    share: float  # of the warps that it could hold
    limit: str  # what keeps it from holding more


MULTIPROCESSORS: Final[Mapping[str, Multiprocessor]] = {
    "sm_80": Multiprocessor(64, 32, 4, 512, 8, 164 * 1024, 128, 1024),
    "sm_90": Multiprocessor(64, 32, 4, 512, 8, 228 * 1024, 128, 1024),
    "sm_100": Multiprocessor(64, 32, 4, 512, 8, 228 * 1024, 128, 1024, tensor_memory=512),
    "gfx942": Multiprocessor(32, 16, 4, 512, 8, 64 * 1024, 512, 0),
}


def occupancy(arch: str, num_warps: int, registers: int, shared_bytes: int, tensor_memory: int = 0) -> Occupancy:
    """How many programs of `num_warps` warps fit a multiprocessor at once.

    Args:
        registers: of a thread; on AMD the vector registers, accumulation registers included.
        shared_bytes: of a program.
        tensor_memory: columns of a program.
    """
    chip = MULTIPROCESSORS[arch]
    warps_by_registers = chip.schedulers * (chip.registers // max(_round_up(registers, chip.register_unit), 1))
    shared = _round_up(shared_bytes + chip.shared_reserved, chip.shared_unit)
    limits = {
        "programs": chip.programs,
        "warps": chip.warps // num_warps,
        "registers": warps_by_registers // num_warps,
    }
    if shared:
        limits["shared"] = chip.shared_bytes // shared
    if tensor_memory:
        limits["tensor memory"] = chip.tensor_memory // tensor_memory
    limit = min(limits, key=lambda name: limits[name])
    programs = limits[limit]
    return Occupancy(programs, programs * num_warps, programs * num_warps / chip.warps, limit)


@dataclass(frozen=True)
class Peak:
    """What a device does at most, in a second."""

    arch: str
    bf16_flops: float
    fp32_flops: float
    num_bytes: float

    def roofline_s(self, flops: float, num_bytes: float, *, uses_dot: bool) -> float:
        """The least time: of the arithmetic or of the memory traffic, whichever is longer."""
        return max(flops / (self.bf16_flops if uses_dot else self.fp32_flops), num_bytes / self.num_bytes)


_ARCHS: Final = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "MI300X": "gfx942"}
PEAKS: Final[Mapping[str, Peak]] = {
    model: Peak(_ARCHS[model], peaks.flops_per_s["bf16"], peaks.flops_per_s["fp32"], peaks.bytes_per_s)
    for model, peaks in DATA_SHEETS.items()
}


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
