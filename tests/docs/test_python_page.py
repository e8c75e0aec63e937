"""The cells of docs/python.md run as they stand there, one after the other as in a notebook."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import sftx
from sftx.api import Inspection, TrainedRun

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def run_cell(source: str, variables: dict[str, Any]) -> Any:
    """Run one cell, and return the value of its last line when that is an expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), variables)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), variables)


def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(cells) == 3
    variables: dict[str, Any] = {}
    shown, metrics, _ = (run_cell(cell, variables) for cell in cells)
    assert isinstance(shown, Inspection)
    assert "row 1, messages" in str(shown)
    assert "srcdoc=" in shown._repr_html_()
    result = variables["result"]
    assert metrics["loss"] < result.summary["held_out"]["before"]["loss"]
    assert variables["same"] == TrainedRun(Path("runs/plus"), result.summary)
    assert capsys.readouterr().out.splitlines()[-1].startswith("['")


def test_the_options_and_fields_of_the_tables_exist() -> None:
    arguments = re.findall(r"^\| (`[^|]+`) \|", PAGE, re.MULTILINE)
    names = set(re.findall(r"`(\w+)(?:\(\*\w+\))?`", " ".join(arguments)))
    known = set(sftx.run.__code__.co_varnames) | set(dir(TrainedRun)) | {"output_dir", "summary"}
    assert names
    assert names <= known
