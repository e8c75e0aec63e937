"""When a run saves and stops, and which of its checkpoints is the best."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from killing import Runs
from resuming import PACKED, SHORT, Sftx, checkpoints, interrupted, lines
from sftx.checkpoint.run_state import RunState
from sftx.config.options import TrainConfig
from sftx.events import EvalReport


def told(values: list[float], **options: Any) -> tuple[RunState, list[bool]]:
    """The state after evaluations of these values, and which of them were the best so far."""
    state, config = RunState(), TrainConfig(eval_steps=1, metric_for_best_model="score", **options)
    return state, [
        state.add_evaluation(EvalReport(step, {"score": value}), value, config) for step, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("options", "values", "best"),
    [
        ({"greater_is_better": False}, [3.0, 2.0, 2.5, 1.9], [True, True, False, True]),
        ({}, [0.3, 0.2, 0.25, 0.2], [True, False, False, False]),
        ({"greater_is_better": True}, [0.1, 0.2, 0.2, 0.3], [True, True, False, True]),
    ],
)
def test_which_evaluation_is_the_best(options: dict[str, Any], values: list[float], best: list[bool]) -> None:
    state, found = told(values, **options)
    assert found == best
    at = max(n for n, is_best in enumerate(best) if is_best)
    assert (state.best_step, state.best_value) == (at + 1, values[at])


@pytest.mark.parametrize(
    ("name", "greater"),
    [("loss", False), ("eval_loss", False), ("perplexity", False), ("rougeL", True), ("eval_exact-match", True)],
)
def test_names_say_which_way_is_better(name: str, greater: bool) -> None:
    config = TrainConfig(eval_steps=1, metric_for_best_model=name)
    assert config.is_greater_better is greater
    assert not str(config.best_metric).startswith("eval_")
    assert TrainConfig(eval_steps=1, load_best_model_at_end=True).best_metric == "loss"


def test_the_evaluation_before_training_is_never_the_best() -> None:
    state = RunState()
    assert not state.add_evaluation(EvalReport(0, {"loss": 1.0}), 1.0, TrainConfig(eval_steps=1))
    assert state.best_step is None


def test_a_metric_that_nobody_reports_ends_the_run_at_its_beginning(runs: Runs, sftx: Sftx) -> None:
    directory = runs.directory("unknown")
    result = sftx(SHORT, directory, "--metric-for-best-model", "los")
    assert result.exit_code == 1
    assert "metric_for_best_model 'los' is not reported; did you mean 'loss'?" in result.stderr
    assert not (directory / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Every step is later than a microsecond after the last: the clock saves each, and two are kept.
        ("--save-minutes 1e-8 --save-steps 1000 --save-total-limit 6", [f"step-{n}" for n in range(1, 7)]),
        ("--save-minutes 1e-8", ["step-6"]),  # SHORT keeps one
        ("--save-minutes 600 --save-steps 4 --save-total-limit 9", ["step-4", "step-6"]),  # the last step as well
    ],
)
def test_the_clock_saves(runs: Runs, sftx: Sftx, options: str, expected: list[str]) -> None:
    directory = runs.directory("clock")
    assert sftx(SHORT, directory, *options.split()).exit_code == 0
    assert checkpoints(directory / "out") == expected


def test_how_many_checkpoints_stay_by_default() -> None:
    assert TrainConfig().checkpoints_kept == 2
    assert TrainConfig(save_steps=5).checkpoints_kept is None
    assert TrainConfig(save_steps=5, save_minutes=10).checkpoints_kept == 2
    assert TrainConfig(save_steps=5, save_total_limit=7).checkpoints_kept == 7


BEST_OF_ALL = [
    "--learning-rate",
    "3e-2",
    "--eval-steps",
    "2",
    "--save-steps",
    "1000",
    "--load-best-model-at-end",
    "--max-steps",
    "8",
    "--lr-scheduler-type",
    "constant",
]


def test_a_whole_model_becomes_that_of_its_best_step(runs: Runs, sftx: Sftx) -> None:
    directory = runs.directory("whole")
    result = sftx(PACKED, directory, *BEST_OF_ALL)
    assert result.exit_code == 0, result.output
    out = directory / "out"
    summary = json.loads((out / "summary.json").read_text())
    best = summary["best"]["step"]
    assert best < summary["num_steps"], "the best was the last, which proves nothing"
    weights = "model.safetensors"
    saved = out / "checkpoints" / f"step-{best}" / weights
    assert (out / "model" / weights).read_bytes() == saved.read_bytes()
    assert summary["held_out"]["after"]["loss"] == summary["best"]["value"]
    assert lines(out / "metrics.jsonl")[-1]["step"] == best, "what is handed over was evaluated"


@pytest.mark.parametrize("lost", ["gone", "flipped"])
def test_a_best_checkpoint_that_is_lost_is_told_and_never_the_result(
    runs: Runs, sftx: Sftx, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    directory, end = interrupted(runs, sftx, PACKED, 8, *BEST_OF_ALL)
    best = json.loads((end / "summary.json").read_text())["best"]["step"]
    place = directory / "out" / "checkpoints" / f"step-{best}"
    if lost == "gone":
        # What the run goes on from lies there too, as with these options only the best is saved.
        (directory / "out" / "checkpoints" / "step-7").mkdir()
        shutil.copytree(place, directory / "out" / "checkpoints" / "step-7", dirs_exist_ok=True)
        shutil.rmtree(place)
    else:
        shutil.copytree(place, directory / "out" / "checkpoints" / "step-7")
        file = place / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    result = sftx(PACKED, directory, *BEST_OF_ALL, "--resume")
    assert result.exit_code == 0, result.output
    assert f"step-{best}, the best so far, is lost" in caplog.text
    summary = json.loads((directory / "out" / "summary.json").read_text())
    assert summary["num_steps"] == 8
    assert not Path(directory / "out" / "model" / "adapter_model.safetensors").exists()
