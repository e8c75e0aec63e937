"""What a device is called, how much memory it has, and how fast it multiplies at best. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sftx.errors import ConfigError

_UNITS: Final = {"GB": 10**9, "GiB": 2**30}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", re.IGNORECASE)

# Dense peak of bf16, in FLOP/s, without sparsity: the data sheets of NVIDIA. Memory in bytes, as the cards are sold.
_CARDS: Final = {
    "h200": (989e12, 141 * 10**9),
    "h100": (989e12, 80 * 10**9),
    "a100": (312e12, 80 * 10**9),
    "l40s": (362e12, 48 * 10**9),
    "4090": (165e12, 24 * 10**9),
    "l4": (121e12, 24 * 10**9),
}


@dataclass(frozen=True)
class Device:
    """What is planned for. `num_bytes` None: as much as there is."""

    name: str
    is_gpu: bool
    num_bytes: int | None = None
    flops: float | None = None
    """Dense peak of bf16, per second."""


CPU: Final = Device("cpu", is_gpu=False)


def parse(text: str) -> Device:
    """`24GB`, `24GiB`, `cpu`, or a card's name. Raises ConfigError."""
    if text.lower() == "cpu":
        return CPU
    if (card := _CARDS.get(text.lower())) is not None:
        return Device(text.lower(), is_gpu=True, num_bytes=card[1], flops=card[0])
    found = _SIZE.fullmatch(text.strip())
    unit = next((size for name, size in _UNITS.items() if found and found[2].lower() == name.lower()), 0)
    num_bytes = int(float(found[1]) * unit) if found else 0
    if num_bytes <= 0:
        raise ConfigError(
            f"--gpu {text!r}: expected a GPU's memory, such as 24GB or 22.5GiB, cpu, or one of {', '.join(_CARDS)}"
        )
    return Device(f"a GPU of {text.strip()}", is_gpu=True, num_bytes=num_bytes)
