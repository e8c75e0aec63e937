"""Compare a run in several processes with the same run in one: losses must agree to 1e-5.

The order of additions in fp32 differs: neighbouring fp32 numbers around a loss of 6 are 5e-7 apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from ranked import lines
from sftx.verify.run_differences import differences

DDP: Final = "--distributed ddp "
FSDP2: Final = "--distributed fsdp2 "


def compare(out: Path, alone: Path) -> None:
    """Raise AssertionError at the first difference of two run directories."""
    compare_steps(out, alone)
    compare_evaluations(out, alone)
    compare_artefacts(out, alone)


def of_kind(out: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in lines(out) if line["event"] == event]


def compare_steps(out: Path, alone: Path) -> None:
    ours, theirs = of_kind(out, "step"), of_kind(alone, "step")
    for name in ("step", "epoch", "num_label_tokens", "num_input_tokens", "learning_rate"):
        assert [step[name] for step in ours] == [step[name] for step in theirs], name
    assert len(theirs) == 10
    for step, reference in zip(ours, theirs, strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], rel=0, abs=1e-5)
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4, abs=0)


def compare_evaluations(out: Path, alone: Path) -> None:
    ours, theirs = of_kind(out, "evaluate"), of_kind(alone, "evaluate")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 5, 10]
    for line, reference in zip(ours, theirs, strict=True):
        assert line.keys() == reference.keys()
        for name in line.keys() - {"event", "step", "seconds"}:
            rel = 1e-5 if name == "perplexity" else 0
            assert line[name] == pytest.approx(reference[name], rel=rel, abs=1e-5), name
    answers = "generated_predictions.jsonl"
    assert (out / answers).exists() == (alone / answers).exists()
    if (alone / answers).exists():
        assert (out / answers).read_text() == (alone / answers).read_text()


def compare_artefacts(out: Path, alone: Path) -> None:
    """Compare file names and weights, also a checkpoint's; the tolerance is small against what training changed."""
    names = {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == names
    files = [name for name in names if name.name.endswith("model.safetensors")]
    assert files
    for weights in files:
        ours, theirs = load_file(out / weights), load_file(alone / weights)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_label_tokens"] == json.loads((alone / "summary.json").read_text())["num_label_tokens"]


def differing(ours: Path, theirs: Path) -> list[str]:
    """Return the files whose bytes differ, except the report, which shows durations."""
    return [line for line in differences(ours, theirs) if not line.startswith("report.html: ")]
