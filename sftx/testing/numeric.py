"""Norms and derivatives, for contracts that compare gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def norm(tensors: Sequence[Tensor]) -> float:
    """The Euclidean norm of all of them together, added up in fp64."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def slope(value: Callable[[], float], parameters: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> float:
    """The derivative along `direction`: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, whose error is of order h^4.

    Abramowitz and Stegun, table 25.2. The parameters are put back to the bit.
    """
    begin = [parameter.detach().clone() for parameter in parameters]

    def at(distance: float) -> float:
        with torch.no_grad():
            for parameter, start, along in zip(parameters, begin, direction, strict=True):
                parameter.copy_(start + distance * along)
        return value()

    try:
        return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    finally:
        with torch.no_grad():
            for parameter, start in zip(parameters, begin, strict=True):
                parameter.copy_(start)
