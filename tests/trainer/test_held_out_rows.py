"""Runs whose held-out rows are also trained on, and runs that hold rows out of their training data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sftx.cli import main

TINY = "--model sftx:tiny --use-cpu --plugin chatml --plugin lora --max-steps 2 --per-device-train-batch-size 2"


@pytest.fixture(autouse=True)
def _in_a_directory_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", range(20))
    write("b.jsonl", range(19, 39))


def write(name: str, numbers: range) -> None:
    rows = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}.", "user": n % 5} for n in numbers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sftx(command: str) -> Result:
    return CliRunner().invoke(main, f"{command} {TINY}".split() if command.startswith("run") else command.split())


@pytest.mark.parametrize("files", ["--data a.jsonl --eval-data ./a.jsonl", "--data *.jsonl --eval-data b.jsonl"])
def test_a_file_that_is_both_trained_on_and_held_out_is_an_error(files: str) -> None:
    done = sftx(f"run {files}")
    assert done.exit_code == 1
    assert "jsonl: is both training data and held-out data" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("runs").exists()


def test_rows_that_are_both_are_said_and_stop_the_run_past_a_share() -> None:
    done = sftx("run --data a.jsonl --eval-data b.jsonl")
    assert done.exit_code == 0
    found = "1 of 20 held-out examples (5.0%) is trained on (first: b.jsonl:1 is a.jsonl:20)"
    assert sum(found in line for line in done.stderr.splitlines()) == 1
    stopped = sftx("run --data a.jsonl --eval-data b.jsonl --max-overlap 0.04")
    assert stopped.exit_code == 1
    assert f"sftx: error: {found}, more than data.max_overlap=0.04 allows" in stopped.stderr
    assert len(list(Path("runs").iterdir())) == 1
    Path("c.jsonl").write_bytes(Path("a.jsonl").read_bytes())
    assert "20 of 20 held-out examples (100.0%)" in sftx("run --data a.jsonl --eval-data c.jsonl").stderr
    wanted = sftx("run --data a.jsonl --eval-data a.jsonl --max-overlap 1")
    assert wanted.exit_code == 0
    assert "20 of 20 held-out examples (100.0%)" in wanted.stderr


def test_a_run_holds_rows_out_of_its_training_data_and_resumes_on_the_same() -> None:
    command = "run --data a.jsonl --data b.jsonl --eval-fraction 0.2 --eval-group user --plugin exact-match"
    command += " --max-new-tokens 2 --save-steps 1 --eval-steps 1 --output-dir out"
    done = sftx(command)
    assert done.exit_code == 0, done.output
    assert "are trained on" not in done.output
    manifest = json.loads(Path("out/manifest.json").read_text())
    entries = [json.loads(line) for line in Path("out/ledger.jsonl").read_text().splitlines()]
    assert {entry["action"] for entry in entries} == {"held out"}
    assert manifest["eval_split"]["num_held_out"] == len(entries) == 8
    assert manifest["eval_split"]["num_rows"] == 40
    assert "rows        40 (32 prompt-completion), held out 8" in done.stdout
    assert "eval_fraction: 0.2" in Path("out/run.yaml").read_text()
    summary = json.loads(Path("out/summary.json").read_text())
    assert "exact-match" in summary["held_out"]["after"]

    Path("out/summary.json").unlink()
    again = sftx(f"{command} --resume")
    assert again.exit_code == 0, again.output
    assert json.loads(Path("out/summary.json").read_text())["held_out"]["after"] == summary["held_out"]["after"]
    Path("out/summary.json").unlink()
    other = sftx(f"{command.replace('0.2', '0.4')} --resume")
    assert "data.eval_fraction was 0.2 and is 0.4" in other.stderr


def test_every_command_knows_the_rows_that_are_held_out() -> None:
    options = "--data a.jsonl --eval-fraction 4 --model sftx:tiny --plugin chatml"
    held = json.loads(sftx(f"inspect {options} --split eval --rows 20 --json -").stdout)
    train = json.loads(sftx(f"inspect {options} --rows 20 --json -").stdout)
    places = {row["where"] for row in held["rows"]}
    assert len(places) == held["figures"]["num_rows"] == 4
    assert {row["where"] for row in train["rows"] if row["status"] == "held out"} == places
    assert len(train["rows"]) - train["figures"]["num_examples"] == 4
    assert "0 errors" in sftx(f"doctor {options}").stdout
    assert sftx(f"plan {options} --num-tokens 1000").exit_code == 0
    done = sftx("data export --data a.jsonl --eval-fraction 4 --output -")
    assert len(done.stdout.splitlines()) == 16
    assert "4 of 20 rows held out: data.eval_fraction=4" in done.stderr
    assert "held-out" in sftx(f"inspect {options.replace('--eval-fraction 4', '')} --split eval").stderr
    assert "leakage" not in sftx(f"doctor {options}").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--eval-fraction 0.2 --eval-data b.jsonl", "held-out rows are given with data.eval already"),
        ("--eval-fraction 0.2 --streaming", "a stream is not read before it is trained on"),
        ("--eval-fraction 1.5", "expected a share below 1, or a whole number of rows"),
        ("--eval-fraction 0", "expected a number greater than 0"),
        ("--eval-group user", "has no meaning without data.eval_fraction"),
        ("--eval-fraction 20", "leaves no row to train on of 20"),
    ],
)
def test_what_cannot_be_split_is_one_line(options: str, message: str) -> None:
    done = sftx(f"run --data a.jsonl {options}")
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
