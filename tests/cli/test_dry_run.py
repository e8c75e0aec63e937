"""`sftx run --dry-run`: the complete run file that a command line means."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sftx.config import run_file
from sftx.config.options import SECTIONS


def sftx(*arguments: str) -> Result:
    from sftx.cli import main

    return CliRunner().invoke(main, ["run", *arguments], catch_exceptions=False)


def test_a_dry_run_prints_a_run_file_that_means_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    given = ["--model", "sftx:tiny", "--data", "rows.jsonl:2", "--plugin", "chatml", "--plugin", "lora"]
    given += ["--learning-rate", "1e-5", "--set", "lora.r=4", "--set", "data.system=It's #1: {yes}\nand no"]
    first = sftx(*given, "--dry-run")
    assert first.exit_code == 0, first.output
    assert "  learning_rate: 1.0e-05  # --learning-rate 1e-5\n" in first.stdout
    assert "    r: 4  # --set lora.r=4\n" in first.stdout
    Path("run.yaml").write_text(first.stdout, encoding="utf-8")
    values, _ = run_file.read(Path("run.yaml"))
    assert set(values) == SECTIONS
    assert values["data"]["train"] == [{"path": "rows.jsonl", "weight": 2.0}]
    assert values["data"]["system"] == "It's #1: {yes}\nand no"
    second = sftx("run.yaml", "--dry-run")
    Path("second.yaml").write_text(second.stdout, encoding="utf-8")
    assert run_file.read(Path("second.yaml"))[0] == values
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl", "run.yaml", "second.yaml"]


def test_a_dry_run_finds_what_a_run_finds_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = sftx("--data", "nowhere.jsonl", "--plugin", "chatml", "--dry-run")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nowhere.jsonl: no such file" in done.stderr
