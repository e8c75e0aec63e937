"""Finds the device that a run would use on this machine. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from sftx.inspection.memory_plan.target_device import TargetDevice, parse

_FREE_SHARE: Final = 0.6
"""The part of the free memory that is planned with: glibc keeps up to a third of what is freed (docs/planning.md)."""


def find(text: str | None) -> TargetDevice:
    """Return the device that `text` names, as `sftx plan --gpu` does; by default that of this machine.

    Raises ConfigError.
    """
    device = _own_gpu() if text is None else parse(text)
    return _own_cpu() if device is None or not device.is_gpu else device


def _own_gpu() -> TargetDevice | None:
    """Return the first GPU that nvidia-smi knows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"(.+), (\d+)$", done.stdout.partition("\n")[0].strip())
    if done.returncode or match is None:
        return None
    return TargetDevice(match[1], is_gpu=True, num_bytes=int(match[2]) * 2**20)


def _own_cpu() -> TargetDevice:
    information = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", information.read_text()) if information.exists() else None
    if match is not None:
        free = int(match[1]) * 1024
    elif hasattr(os, "sysconf"):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return TargetDevice("cpu", is_gpu=False)
    return TargetDevice("cpu", is_gpu=False, num_bytes=int(free * _FREE_SHARE))
