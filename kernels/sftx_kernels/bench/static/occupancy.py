"""`occupancy` computes how many programs fit a multiprocessor of the static report's chips.

It is computed as in NVIDIA's occupancy calculator: registers are allocated by the warp in units of 256, shared memory
by the program in units of 128 bytes on top of 1 KB that the system reserves for each program (sm_80 and later); limits
from the CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". On AMD a wave of 64
threads takes vector registers in units of 8 out of 512 a SIMD, and LDS in units of 512 bytes; limits from the CDNA3 ISA
guide and LLVM's AMDGPUBaseInfo.cpp (gfx942).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple


@dataclass(frozen=True)
class Multiprocessor:
    """A Multiprocessor has the limits of one multiprocessor (a compute unit on AMD)."""

    warps: int
    programs: int
    schedulers: int
    registers: int  # of each scheduler; one is 32 bits for each thread of a warp
    register_unit: int  # of allocation
    shared_bytes: int
    shared_unit: int  # of allocation
    shared_reserved: int  # by the system, for each program
    tensor_memory: int = 0  # columns of the fifth generation's tensor memory


class Occupancy(NamedTuple):
    programs: int  # on one multiprocessor at once
    warps: int
    share: float  # of the largest number of warps
    limit: str  # the resource that allows no more


MULTIPROCESSORS: Final[Mapping[str, Multiprocessor]] = {
    "sm_80": Multiprocessor(64, 32, 4, 512, 8, 164 * 1024, 128, 1024),
    "sm_90": Multiprocessor(64, 32, 4, 512, 8, 228 * 1024, 128, 1024),
    "sm_100": Multiprocessor(64, 32, 4, 512, 8, 228 * 1024, 128, 1024, tensor_memory=512),
    "gfx942": Multiprocessor(32, 16, 4, 512, 8, 64 * 1024, 512, 0),
}


def occupancy(arch: str, num_warps: int, registers: int, shared_bytes: int, tensor_memory: int = 0) -> Occupancy:
    """Return how many programs of `num_warps` warps fit a multiprocessor at once.

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


CHIP_OF_DEVICE: Final = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "MI300X": "gfx942"}
"""This maps each device of `devices.DATA_SHEETS` to its chip; the report shows their rooflines."""


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
