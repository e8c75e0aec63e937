"""Makes a bench short: few rounds, and no time spent on what the machine could do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    from benching import PEAKS
    from sftx_kernels.bench import devices, measure, runner

    monkeypatch.setattr(measure, "MAX_ROUNDS", measure.MIN_ROUNDS)
    monkeypatch.setattr(runner, "describe", lambda device, dtypes: devices.Device(device, "a CPU", PEAKS))


@pytest.fixture
def shapes(tmp_path: Path) -> Callable[..., Path]:
    """`shapes(a, b)` writes a shapes file."""
    from benching import shapes_file

    return lambda *shapes: shapes_file(tmp_path, *shapes)
