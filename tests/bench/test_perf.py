"""`make perf` finds what has become slower, and nothing has."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[2] / "benchmarks" / "perf.py"


@pytest.fixture(scope="module")
def perf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("perf", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["perf"] = module  # dataclasses looks its annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("repeats", "code"), [(2, 0), (4, 1)])
def test_a_loss_of_speed_is_found(
    repeats: int, code: int, perf: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    x = torch.randn(300, 300)

    def case(dtype: torch.dtype, directory: Path) -> object:
        return perf.Case(f"products, {dtype}", lambda: [x @ x for _ in range(repeats)], lambda: x @ x)

    monkeypatch.setattr(perf, "OPERATIONS", (case,))
    monkeypatch.setattr(perf, "BASELINE", tmp_path / "perf.json")
    names = [f"products, {dtype}" for dtype in (torch.float32, torch.bfloat16)]
    (tmp_path / "perf.json").write_text(json.dumps({perf.processor(): dict.fromkeys(names, 2.5)}))
    assert perf.main(["--short"]) == code
    assert capsys.readouterr().out.count("WORSE") == 2 * code


def test_a_machine_without_figures_is_told(
    perf: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perf, "OPERATIONS", ())
    monkeypatch.setattr(perf, "BASELINE", tmp_path / "perf.json")
    assert perf.main(["--short"]) == 0
    assert "nothing is recorded for a processor with" in capsys.readouterr().err


@pytest.mark.slow
def test_operations_are_as_fast_as_recorded(perf: ModuleType) -> None:
    if perf.processor() not in json.loads(perf.BASELINE.read_text()):
        pytest.skip(f"nothing is recorded for a processor with {perf.processor()}")
    assert perf.main(["--short"]) == 0
