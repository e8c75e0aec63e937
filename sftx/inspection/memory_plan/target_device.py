"""The device that a run is planned for: its name, memory and peak matrix throughput. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sftx.errors import ConfigError

_UNITS: Final = {"gb": 10**9, "gib": 2**30}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", re.IGNORECASE)

# From NVIDIA's data sheets: the dense peak of bf16 in FLOP/s, without sparsity; the memory in bytes, as the cards are
# sold; the memory's bandwidth in bytes/s.
_CARDS: Final = {
    "h200": (989e12, 141 * 10**9, 4.8e12),
    "h100": (989e12, 80 * 10**9, 3.35e12),
    "a100": (312e12, 80 * 10**9, 2.04e12),
    "l40s": (362e12, 48 * 10**9, 0.864e12),
    "4090": (165e12, 24 * 10**9, 1.01e12),
    "l4": (121e12, 24 * 10**9, 0.3e12),
}


@dataclass(frozen=True)
class TargetDevice:
    """A kind of device. `num_bytes` is None when its memory is unlimited."""

    name: str
    is_gpu: bool
    num_bytes: int | None = None
    flops: float | None = None
    """Dense bf16 peak in FLOP/s, if known."""
    bandwidth: float | None = None
    """Bytes of its memory that are read per second, if known."""


CPU: Final = TargetDevice("cpu", is_gpu=False)


def parse(text: str) -> TargetDevice:
    """Parse the value of `--gpu`: `24GB`, `24GiB`, `cpu` or a card's name. Raises ConfigError."""
    if text.lower() == "cpu":
        return CPU
    if (card := _CARDS.get(text.lower())) is not None:
        return TargetDevice(text.lower(), is_gpu=True, num_bytes=card[1], flops=card[0], bandwidth=card[2])
    size = _SIZE.fullmatch(text.strip())
    num_bytes = int(float(size[1]) * _UNITS[size[2].lower()]) if size else 0
    if num_bytes <= 0:
        raise ConfigError(
            f"--gpu {text!r}: expected a GPU's memory, such as 24GB or 22.5GiB, cpu, or one of {', '.join(_CARDS)}"
        )
    return TargetDevice(f"a GPU of {text.strip()}", is_gpu=True, num_bytes=num_bytes)
