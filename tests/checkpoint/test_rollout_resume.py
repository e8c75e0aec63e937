"""A run with a rollout that is interrupted within a window and resumed ends like one that was not: bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from killing import Runs, case
from resuming import Sftx, copy, interrupted, lines, only_shared, signal_at
from sftx.verify.run_differences import differences

SEED = int(os.environ.get("SFTX_KILL_SEED", time.time_ns() % 10**6))
GRPO = case(
    "grpo",
    "--plugin chatml --plugin lora --set lora.lora_dropout=0.2 --learning-rate 1e-2 --data {data}/train.jsonl "
    "--eval-data {data}/held.jsonl --plugin exact-match --eval-steps 5 --max-new-tokens 6 --max-dropped 0.2 "
    "--plugin grpo --set grpo.num_generations=3 --set grpo.max_completion_length=6 --set grpo.steps_per_generation=2 "
    "--set grpo.num_iterations=2 --set grpo.beta=0.05 --plugin reward-function "
    f"--set reward-function.function={Path(__file__).parents[1] / 'helpers' / 'reward_functions.py'}:letters "
    "--gradient-accumulation-steps 2 --per-device-train-batch-size 2 --save-steps 3 --save-total-limit 9 "
    "--max-steps 13 --logging-steps 1",
)
"""Windows of four steps, and checkpoints within them."""


def ends_like(runs: Runs, out: Path, whole: Path) -> None:
    assert differences(whole, out) == []
    answers = lines(whole / "rollouts.jsonl")
    assert {line["step"] for line in answers} == {0, 4, 8, 12}
    assert len({line["reward"] for line in answers}) > 3, "rewards must differ, or equal runs would prove little"


@pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (7, 10))])
def test_what_a_kill_leaves_within_a_window_is_gone_on_with(runs: Runs, sftx: Sftx, step: int) -> None:
    left, whole = interrupted(runs, sftx, GRPO, step)
    saved = [path.name for path in (left / "out" / "checkpoints").iterdir()]
    assert f"step-{(step - 1) // 3 * 3}" in saved
    plan = json.loads((left / "out" / "checkpoints" / f"step-{(step - 1) // 3 * 3}" / "run_state.json").read_text())
    assert plan["plan"]["examples"], "the checkpoint must be within a window"
    result = sftx(GRPO, left, "--resume")
    assert result.exit_code == 0, result.output
    ends_like(runs, left / "out", whole)


@pytest.mark.slow
def test_a_signal_between_the_tokens_of_answers_loses_no_step(runs: Runs, sftx: Sftx) -> None:
    whole = runs.undisturbed(GRPO)[0]
    directory = runs.directory("signal")
    with signal_at(None, signal.SIGTERM) as count:
        assert sftx(GRPO, directory).exit_code == 0
        places = count()
    stopped = 0
    for place in random.Random(SEED).sample(range(2, places), 2):
        directory = runs.directory("signal")
        with signal_at(place, signal.SIGTERM):
            first = sftx(GRPO, directory)
        if "nothing was kept" in first.output:
            continue
        stopped += 1
        assert "--resume continues" in first.output
        assert sftx(GRPO, directory, "--resume").exit_code == 0
        found = only_shared(whole, directory / "out")
        assert found == [], f"SFTX_KILL_SEED={SEED} {place}"
    assert stopped


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_the_same(runs: Runs) -> None:
    killed = runs.killed(GRPO, random.Random(SEED), kills=3)
    assert killed.codes[-1] == 0, f"SFTX_KILL_SEED={SEED} {killed}"
    assert differences(runs.undisturbed(GRPO)[0], killed.output_dir) == [], f"SFTX_KILL_SEED={SEED} {killed.story}"


@pytest.mark.slow
def test_a_line_that_was_not_finished_is_dropped(runs: Runs, sftx: Sftx) -> None:
    left, whole = interrupted(runs, sftx, GRPO, 6)
    with (left / "out" / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "row": "half a li')
    assert sftx(GRPO, copy(left / "out", runs, "half"), "--resume").exit_code == 0
    assert sftx(GRPO, left, "--resume").exit_code == 0
    ends_like(runs, left / "out", whole)
