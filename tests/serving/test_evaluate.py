"""`sftx evaluate` gives the numbers of the run's own evaluation, on its rows and on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sftx.cli import main
from sftx.testing.runs import run_tiny

SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoot", "bee": "buzz"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has learned some of its rows, and holds two of them out."""
    rows = [
        {"messages": [{"role": "user", "content": animal}, {"role": "assistant", "content": sound}]}
        for animal, sound in SOUNDS.items()
    ]
    settings = {
        "data.eval": [],
        "data.eval_fraction": 2,
        "train.learning_rate": 0.02,
        "train.max_steps": 12,
        "train.eval_steps": 6,
        "train.per_device_eval_batch_size": 2,
        "train.optim": "lion",
        "train.bf16": False,
        "generation.max_rows": None,
        "lora.r": 8,
    }
    directory = tmp_path_factory.mktemp("evaluated")
    return run_tiny(["lora", "exact-match", "jsonl"], directory, rows=rows, settings=settings).output_dir


def last_evaluation(run_dir: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line and line["event"] == "evaluate"][-1]
    return {name: last[name] for name in ("loss", "perplexity", "token_accuracy", "exact-match")}


def evaluated(*arguments: str) -> Any:
    result = CliRunner().invoke(main, ["evaluate", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_runs_own_rows_give_the_numbers_of_its_last_evaluation(run_dir: Path) -> None:
    expected = last_evaluation(run_dir)
    found = evaluated(str(run_dir))
    assert {name: found["trained"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert (found["rows"], found["answers"]) == (2, 2)
    assert evaluated(str(run_dir / "adapter"))["trained"] == found["trained"]


def test_the_base_is_the_model_before_training(run_dir: Path) -> None:
    before = json.loads((run_dir / "summary.json").read_text())["held_out"]["before"]
    found = evaluated(str(run_dir), "--compare-base")
    assert found["base"]["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert found["base"]["loss"] != found["trained"]["loss"]


def test_other_rows_metrics_and_evaluators_may_be_named(run_dir: Path, tmp_path: Path) -> None:
    rows = tmp_path / "others.jsonl"
    rows.write_text('{"prompt": "cat", "completion": "meow"}\n{"prompt": "cow", "completion": "moo"}\n')
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "cat", "choices": ["meow", "woof"], "answer": 0}\n')
    found = evaluated(
        str(run_dir), "--eval-data", str(rows), "--no-plugin", "exact-match", "--plugin", "rouge",
        "--plugin", "multiple-choice", "--set", f"multiple-choice.path={questions}",
        "--max-rows", "1",
    )  # fmt: skip
    assert (found["rows"], found["answers"]) == (2, 1)
    assert "exact-match" not in found["trained"]
    assert {"loss", "rouge1", "acc"} <= found["trained"].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "has no held-out rows of its own; give some with --eval-data"),
        (["{run}", "--eval-data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["{run}", "--plugin", "exact-mtach"], "--plugin exact-mtach: plugin 'exact-mtach' is not installed"),
        (["{run}", "--no-plugin", "exact-mtach"], "--no-plugin exact-mtach: plugin 'exact-mtach' is not installed"),
        (["{run}", "--plugin", "chatml"], "--plugin chatml: chatml neither reads nor scores rows; leave it out"),
        (["{run}", "--no-plugin", "lora"], "--no-plugin lora: lora neither reads nor scores rows"),
        (["{run}", "--set", "lora.r=4"], "--set lora.r=4: lora neither reads nor scores rows"),
        (["{run}", "--set", "train.max_steps=4"], "--set train.max_steps=4: is an option of training"),
        (["{model}", "--eval-data", "{run}/rows.jsonl", "--compare-base"], "has no adapter"),
        (["{plain}", "--eval-data", "{run}/rows.jsonl"], "the model has none (its tokenizer has no chat template)"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run_dir: Path, arguments: list[str], message: str) -> None:
    (run_dir / "rows.jsonl").write_text('{"prompt": "cat", "completion": "meow"}\n')
    plain = run_dir.parent / "plain"
    shutil.copytree(run_dir.parent / "model", plain, dirs_exist_ok=True)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    names = {"run": str(run_dir), "model": str(run_dir.parent / "model"), "plain": str(plain)}
    result = CliRunner().invoke(main, ["evaluate", *(argument.format(**names) for argument in arguments)])
    assert result.exit_code != 0
    [line] = [line for line in result.stderr.splitlines() if line.startswith("sftx: error")]
    assert message in line
