"""`describe` returns the peak rates of a device, from its data sheet if its name is known, else measured."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from sftx_kernels.bench.cases import DTYPES
from sftx_kernels.gemm import widens
from sftx_kernels.triton.launch import Work

_MB: Final = 1 << 20
_TERA: Final = 1e12


@dataclass(frozen=True)
class Peaks:
    """Peaks is the speed of light of a device: dense products without sparsity, and memory."""

    flops_per_s: Mapping[str, float]  # by the keys of DTYPES, and "fp64", in which the references are made
    bytes_per_s: float
    cache_bytes: int  # of the last cache level
    source: str

    def least_seconds(self, work: Work, dtype: str) -> float:
        """Return the time of the arithmetic or of the memory traffic, whichever is longer."""
        return max(work.flops / self.flops_per_s[dtype], work.num_bytes / self.bytes_per_s)


def _sheet(half: float, fp32: float, fp64: float, tb_per_s: float, cache_mb: int) -> Peaks:
    rates = {"fp16": half, "bf16": half, "fp32": fp32, "fp64": fp64}
    return Peaks({k: v * _TERA for k, v in rates.items()}, tb_per_s * _TERA, cache_mb * _MB, "data sheet")


# SXM or OAM modules. fp32 is without TF32, which torch leaves off for products.
DATA_SHEETS: Final[Mapping[str, Peaks]] = {
    "A100": _sheet(312, 19.5, 19.5, 2.039, 40),
    "H100": _sheet(989.4, 66.9, 66.9, 3.35, 50),
    "H200": _sheet(989.4, 66.9, 66.9, 4.8, 50),
    "B200": _sheet(2250, 75, 37, 8.0, 126),
    "MI300X": _sheet(1307.4, 163.4, 163.4, 5.3, 256),
}
# A device whose name contains all the words has that sheet; variants with other clocks (PCIe, NVL) are measured.
_WORDS: Final = {"A100": ("A100", "SXM", "80GB"), "H100": ("H100", "HBM3")}
_VARIANTS: Final = ("PCIe", "NVL", "GB200", "GH200", "MIG")


@dataclass(frozen=True)
class Device:
    torch_device: torch.device
    name: str
    peaks: Peaks


def slug(name: str) -> str:
    """Return a device's name as a directory name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def describe(device: torch.device, dtypes: tuple[str, ...]) -> Device:
    """Return the device with its peak rates; they are measured in these dtypes (keys of DTYPES), fp32 and fp64."""
    name = device_name(device)
    for model, peaks in DATA_SHEETS.items():
        if all(word in name for word in _WORDS.get(model, (model,))) and not any(
            variant in name for variant in _VARIANTS
        ):
            return Device(device, name, peaks)
    return Device(device, name, _measure(device, dtypes))


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or a CPU's model with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


@functools.cache
def _measure(device: torch.device, dtypes: tuple[str, ...]) -> Peaks:
    """Return the best of a few large products in each dtype, and of a few large copies.

    On a CPU a half-precision product may run in fp32, so the peak of a half dtype is at least that of fp32.
    """
    size = 1024 if device.type == "cpu" else 8192
    rates = {}
    for name in dict.fromkeys(("fp32", *dtypes, "fp64")):
        a_SS = torch.randn(size, size, device=device).to(DTYPES.get(name, torch.float64))
        if widens(a_SS):
            continue  # a native product may take seconds here, and the kernels do not use one
        b_SS, out_SS = a_SS.clone(), torch.empty_like(a_SS)
        rates[name] = 2 * size**3 / _best_s(device, functools.partial(torch.mm, a_SS, b_SS, out=out_SS))
    if device.type == "cpu":
        rates |= {name: max(rates.get(name, 0.0), rates["fp32"]) for name in dtypes}
    source = torch.empty(256 * _MB, dtype=torch.uint8, device=device).fill_(1)
    target = torch.zeros_like(source)
    copy_s = _best_s(device, lambda: target.copy_(source))
    return Peaks(rates, 2 * source.numel() / copy_s, _cache_bytes(device), "measured here")


def _best_s(device: torch.device, function: Callable[[], object]) -> float:
    """Return the shortest of 5 calls, or of as many as begin within a second."""
    best, first = float("inf"), time.perf_counter()
    for number in range(5):
        if number and time.perf_counter() - first > 1:
            break
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    return max(size, 0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
