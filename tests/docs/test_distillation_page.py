"""The example of docs/distillation.md runs and gives the figures that the page names; its table has all options."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sftx_plugins.losses.distill import Distill
from sftx_plugins.parsers import _teacher

PAGE = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs_and_its_figures_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    match = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    names: dict[str, Any] = {}
    exec(compile(match[1], "docs/distillation.md", "exec"), names)
    before, after = (names["held_out"][when]["divergence"] for when in ("before", "after"))
    said = re.search(r"fell from ([\d.]+) to ([\d.]+) nats", PAGE)
    assert said is not None
    assert before == pytest.approx(float(said[1]), rel=0.05)
    assert after == pytest.approx(float(said[2]), rel=0.3)


def test_the_tables_have_every_option_and_every_field() -> None:
    named = re.findall(r"^\| `([^|]+?)` \|", PAGE, re.MULTILINE)
    options = {field.name for field in dataclasses.fields(Distill)}
    assert options <= set(named)
    assert {_teacher.IDS, _teacher.LOG_PROBS, _teacher.TEMPERATURE} <= set(named)
