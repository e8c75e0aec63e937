"""The benchmarks run: what nobody runs for weeks breaks when the code below it changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftx.testing.runs import run_tiny

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".assets" / "llamafactory").is_dir(), reason="make assets fetches the demo sets"),
]


def run(*arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def test_packed_and_padded_rows_are_compared() -> None:
    assert "packed / grouped" in run("benchmarks/packing.py", "--quick")


def test_whole_runs_are_compared(tmp_path: Path) -> None:
    """The loss of both ways to batch must be one, or the comparison ends with an error."""
    names = ["sftx packed", "sftx padded"]
    out = tmp_path / "runs.json"
    run("benchmarks/runs", "--rows", "24", "--repeats", "1", "--threads", "1", "--out", str(out), "--trainers", *names)
    report = json.loads(out.read_text(encoding="utf-8"))
    assert list(report["trainers"]) == names
    assert report["absent"] == []
    assert all(figures["tokens_per_second"] > 0 for figures in report["trainers"].values())


def test_the_engine_is_compared_with_generate(tmp_path: Path) -> None:
    """Answers must be the same both ways, or the exit code is 1."""
    out = tmp_path / "generation.json"
    short = ["--rounds", "1", "--batch-sizes", "1", "3", "--dtypes", "float32", "--new-tokens", "3"]
    run("benchmarks/generation.py", *short, "--out", str(out))
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [(one["batch_size"], one["answers"]) for one in results] == [
        (size, kind) for size in (1, 3) for kind in ("full", "stopped")
    ]
    assert all(one["times_as_fast"] > 0 for one in results)


def test_ways_to_ask_a_run_are_compared(tmp_path: Path) -> None:
    directory = run_tiny(["lora"], tmp_path).output_dir
    ways = ("--way", "chat", "--way", "merged", "--rows", "2", "--new-tokens", "4")
    said = run("benchmarks/answers.py", str(directory), *ways)
    assert "| chat | 0.000 | 2 of 2 |" in said
    assert "| transformers, merged | 0.000 | 2 of 2 |" in said


def test_what_a_run_grows_with_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "sweeps.json"
    run("benchmarks/sweeps.py", "--points", "1", "--steps", "2", "--sweeps", "sequence", "rows", "--out", str(out))
    sweeps = json.loads(out.read_text(encoding="utf-8"))["sweeps"]
    assert {name: [point["value"] for point in points] for name, points in sweeps.items()} == {
        "sequence": [512],
        "rows": [1000],
    }
    assert sweeps["sequence"][0]["tokens_per_second"] > 0
    assert out.with_suffix(".png").is_file()
