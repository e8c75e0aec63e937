"""The tables of docs/performance-gpu.md are those of benchmarks/results/rehearsal.json."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_has_the_tables_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import rehearsal

    report = json.loads((ROOT / "benchmarks" / "results" / "rehearsal.json").read_text(encoding="utf-8"))
    page = rehearsal.PAGE.read_text(encoding="utf-8")
    assert rehearsal.fill(page, report) == page
    named = set(re.findall(r"<!-- (.*) -->", page)) - {"end"}
    assert named <= rehearsal.tables(report).keys()
    assert len(named) >= 10
    assert all(case["faults"] == [] for case in report["cases"])
