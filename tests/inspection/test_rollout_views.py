"""What looks at a run with a rollout: the report, `inspect`, `doctor` and `plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sftx.inspection.run_report.run_record import read_run
from sftx.inspection.run_report.write_report import page_data


def run_of(directory: Path, windows: int) -> Path:
    steps = [
        {"event": "step", "step": n, "num_steps": windows, "loss": 0.1, "num_label_tokens": 9, "seconds": 1.0}
        | {"reward": n / windows, "kl": 0.01 * n, "rewards/polite/mean": 0.5, "completions/mean_length": 7.0}
        for n in range(1, windows + 1)
    ]
    answers = [
        {"step": step, "row": "rows:1", "prompt": "Hi?", "reference": "Ho", "answer": f"answer {step} {n}"}
        | {"rewards": {"polite": reward}, "reward": reward}
        for step in range(windows)
        for n, reward in enumerate((0.5, 1.0, -0.25, 1.0))
    ]
    for name, lines in (("metrics", steps), ("rollouts", answers)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return directory


def test_the_report_has_rewards_and_the_best_and_worst_answers(tmp_path: Path) -> None:
    record = read_run(run_of(tmp_path, windows=20))
    data = page_data([record])
    (run,) = data["runs"]
    assert run["steps"]["reward"][-1] == 1
    assert run["steps"]["rewards/polite/mean"] == [0.5] * 20
    assert "entropy" not in run["steps"]
    labels, (values,) = data["figures"]["labels"], data["figures"]["values"]
    assert values[labels.index("reward")] == "0.05 → 1"
    shown = data["details"]["answered"]
    assert [one["step"] for one in shown] == [0, 3, 7, 11, 15, 19]
    assert [one["best"]["answer"] for one in shown] == [f"answer {one['step']} 1" for one in shown]
    assert [one["worst"]["answer"] for one in shown] == [f"answer {one['step']} 2" for one in shown]
    assert shown[0]["worst"]["rewards"] == "polite -0.25"


def test_a_run_without_a_rollout_has_neither(tmp_path: Path) -> None:
    run_of(tmp_path, windows=2)
    (tmp_path / "rollouts.jsonl").unlink()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").replace('"reward"', '"other"')
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    record = read_run(tmp_path)
    assert record.answered == []
    assert "reward" not in record.steps
    assert "kl" not in record.steps


@pytest.fixture
def sftx(tmp_path: Path, tiny_model: Path) -> Any:
    """Return a function that calls a command on a run with grpo: two questions, one of them without an answer."""
    from sftx.cli import main

    rows = [
        {"messages": [{"role": "user", "content": "What is 1 + 2?"}]},
        {"prompt": "What is 3 + 4?", "completion": "7"},
        {"prompt": "long " * 60, "completion": "7"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def call(command: str, *more: str) -> str:
        arguments = [command, "--model", str(tiny_model), "--data", str(tmp_path / "rows.jsonl")]
        plugins = [word for name in ("chatml", "lora", "grpo", "reward-exact-match") for word in ("--plugin", name)]
        options = ["--set", "grpo.max_completion_length=32", "--max-length", "96", "--max-dropped", "0.5"]
        result = CliRunner().invoke(main, [*arguments, *plugins, *options, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return call


def test_inspect_shows_the_questions_that_leave_room_for_an_answer(sftx: Any) -> None:
    shown = sftx("inspect")
    assert "rows are questions, which the model answers while it trains" in shown
    assert "3 of data.train (1 messages, 2 prompt-completion), 2 examples" in shown


def test_doctor_finds_no_fault_in_rows_of_which_nothing_is_trained(sftx: Any) -> None:
    shown = sftx("doctor")
    assert "label tokens" not in shown
    assert "no example trains" not in shown


@pytest.mark.parametrize(
    "more", [(), ("--plugin", "packed", "--set", "grpo.beta=0.1", "--set", "grpo.num_iterations=2")]
)
def test_plan_counts_the_answers_to_a_question(sftx: Any, more: tuple[str, ...]) -> None:
    shown = " ".join(sftx("plan", *more).split())
    assert "every question has 8 examples" in shown
    assert "peak, in" in shown
