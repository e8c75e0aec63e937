"""What is printed and sent to trackers is the mean since the last line, as in transformers; files have each step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from observing import InterruptedRunError, logged, stop_in, train

LINES = {1: [1], 4: [2, 3, 4], 6: [5, 6]}
"""The steps of each line of a run of six steps with logging_steps 4."""


def history(run: Path) -> dict[int, dict[str, Any]]:
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    return {line["step"]: line for line in state["log_history"] if "loss" in line}


def printed(text: str) -> dict[int, list[str]]:
    return {int(step): re.findall(r"\d\S*", values) for step, values in re.findall(r"step (\d)/6(.*)", text)}


def scalars(run: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader: Any = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {event.step: event.value for event in reader.Scalars(f"train/{name}")}


def test_a_line_is_the_mean_of_its_steps_also_when_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("tensorboard", tmp_path / "whole", train__logging_steps=4).output_dir
    whole = printed(capsys.readouterr().out)
    losses, tokens, inputs, seconds, rates = (
        logged(run, "step", name)
        for name in ("loss", "num_label_tokens", "num_input_tokens", "seconds", "learning_rate")
    )
    assert list(losses) == [1, 2, 3, 4, 5, 6], "metrics.jsonl has each step"
    assert len(set(tokens.values())) > 1

    def mean(values: dict[int, float], steps: list[int]) -> float:
        return sum(values[step] * tokens[step] for step in steps) / sum(tokens[step] for step in steps)

    expected = {last: mean(losses, steps) for last, steps in LINES.items()}
    assert abs(expected[4] - losses[4]) > 1e-3, "the last step's loss is another"
    assert scalars(run, "loss") == pytest.approx(expected, rel=1e-6)
    assert scalars(run, "learning_rate") == pytest.approx({last: rates[last] for last in LINES}, rel=1e-6)
    assert scalars(run, "tokens_per_second") == pytest.approx(
        {last: sum(map(inputs.get, steps)) / sum(map(seconds.get, steps)) for last, steps in LINES.items()},  # type: ignore[arg-type]
        rel=1e-6,
    )
    assert {step: line["loss"] for step, line in history(run).items()} == pytest.approx(expected)
    assert {step: values[0] for step, values in whole.items()} == {n: f"{loss:.4f}" for n, loss in expected.items()}

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    known = {"importing", "loading", "encoding", "checking", "evaluating", "answering", "training", "saving", "other"}
    assert known <= set(summary["seconds"])
    assert sum(summary["seconds"].values()) == pytest.approx(summary["wall_seconds"])
    assert summary["seconds"]["training"] >= sum(seconds.values())

    patch = stop_in(4, InterruptedRunError())  # after the checkpoint of step 3, in the middle of a line
    with pytest.raises(InterruptedRunError):
        train("tensorboard", tmp_path / "resumed", train__logging_steps=4)
    patch.undo()
    again = train("tensorboard", tmp_path / "resumed", resume=True, train__logging_steps=4).output_dir
    assert scalars(again, "loss") == scalars(run, "loss")
    assert {step: line["loss"] for step, line in history(again).items()} == pytest.approx(expected)
    ended = json.loads((again / "summary.json").read_text(encoding="utf-8"))
    before = json.loads((again / "checkpoints" / "step-3" / "run_state.json").read_text(encoding="utf-8"))["run"]
    assert ended["seconds"]["training"] > before["phase_seconds"]["training"] > 0, "an earlier process is counted"
    assert [values[0] for values in printed(capsys.readouterr().out).values()] == [v[0] for v in whole.values()]
