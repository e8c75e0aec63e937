"""LLaMA-Factory's demo sets, as they are: every row is read, inspected and trained on, but two that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import assets
from sftx.cli import main

SETS = {
    "alpaca_en_demo.json": 999,
    "alpaca_zh_demo.json": 1000,
    "glaive_toolcall_en_demo.json": 300,
    "glaive_toolcall_zh_demo.json": 300,
    "reason_tool_use_demo_50.jsonl": 50,
    "identity.json": 91,
    "c4_demo.jsonl": 300,
}


DAMAGED = {"reason_tool_use_demo_50.jsonl": 2}
"""Rows with reasoning in a part of its own and a stray </think> in the text after it."""
FIRST = ("glaive_toolcall_en_demo.json", "packed")
"""The one that `make test` runs: tool calls, of very different lengths."""


@pytest.mark.parametrize(
    ("name", "collator"),
    [
        pytest.param(name, collator, marks=[] if (name, collator) == FIRST else [pytest.mark.slow])
        for name in SETS
        for collator in ("padded", "packed")
    ],
)
def test_a_demo_set_is_run_unedited(tmp_path: Path, name: str, collator: str) -> None:
    out = tmp_path / "out"
    data = str(assets.path("llamafactory", name))
    arguments = ["run", "--model", "sftx:tiny", "--plugin", "chatml", "--plugin", collator, "--data", data]
    arguments += ["--max-length", "16384", "--max-steps", "2", "--per-device-train-batch-size", "1"]
    arguments += ["--output-dir", str(out), *(["--invalid-rows", "drop"] if name in DAMAGED else [])]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"{SETS[name]:,} (" in done.output
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(entry.get("event") == "step" for entry in metrics) == 2
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["action"] for entry in ledger if entry["action"] != "cut"] == ["dropped"] * DAMAGED.get(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_rows"), SETS.items())
def test_a_demo_set_is_inspected_unedited(name: str, num_rows: int) -> None:
    data = str(assets.path("llamafactory", name))
    arguments = ["inspect", "--model", "sftx:tiny", "--plugin", "chatml", "--data", data, "--json", "-"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["rows"], shown.keys()
    assert str(num_rows) in done.stdout
