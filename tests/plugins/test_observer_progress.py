"""What a run prints stays short and in its table, whatever the model answers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sftx_plugins.observers.progress import _samples_table


@pytest.mark.parametrize("answer", ["\n" * 500, "\r\n" * 500, "word " * 500, "\t\r" * 500, "[bold]\n" * 300])
def test_a_long_answer_takes_a_few_lines_of_the_table(answer: str) -> None:
    sample = {"prompt": "Say hello.", "before": answer, "after": "Hello.\nAnd goodbye.", "reference": "Hello."}
    console = Console(file=io.StringIO(), width=120)
    console.print(_samples_table([sample]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(shown.splitlines()) <= 15
    assert "…" in shown
    assert "Hello.⏎And goodbye." in shown
