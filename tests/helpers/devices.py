"""The device of the kernels' tests: the GPU if there is one, else the CPU under Triton's interpreter."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
"""The dtypes in which Triton kernels are tested; the interpreter's bf16 arithmetic is silently wrong."""

BACKENDS = ["torch", "triton"]


def covering(*values: Sequence[Any], strength: int = 2) -> list[Any]:
    """Return the product of the values as parameters of a test, marked slow but for a small covering set.

    The covering set has every combination of `strength` values: with 2, every pair of values of two parameters; with 1,
    every value.
    """
    cases = list(itertools.product(*(range(len(column)) for column in values)))
    columns = list(itertools.combinations(range(len(values)), strength))

    def combinations(case: tuple[int, ...]) -> set[Any]:
        return {(chosen, tuple(case[column] for column in chosen)) for chosen in columns}

    missing = set().union(*map(combinations, cases))
    first_tier = set()
    while missing:
        best = max(cases, key=lambda case: len(combinations(case) & missing))
        first_tier.add(best)
        missing -= combinations(best)
    return [
        pytest.param(
            *(column[index] for column, index in zip(values, case, strict=True)),
            marks=() if case in first_tier else pytest.mark.slow,
        )
        for case in cases
    ]


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the error relative to that of the exact value, or absolute if the latter is almost zero."""
    assert actual.shape == exact.shape
    exact = exact.to(actual.device, torch.float64)
    norm = exact.norm().item()
    return (actual.double() - exact).norm().item() / (norm if norm > 1e-3 else 1.0)
