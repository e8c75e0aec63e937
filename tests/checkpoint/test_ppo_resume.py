"""A run of PPO that is killed goes on bit for bit: policy, value head, the window's numbers, and the KL coefficient."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from killing import Runs, case
from resuming import Sftx, interrupted, lines
from sftx.verify.run_differences import differences

PPO = case(
    "ppo",
    "--plugin chatml --plugin lora --set lora.lora_dropout=0.2 --plugin ppo --plugin reward-regex "
    "--set reward-regex.pattern=.*e.* --set reward-regex.match=search --set ppo.response_length=5 "
    "--set ppo.steps_per_rollout=2 --set ppo.num_ppo_epochs=2 --set ppo.kl_target=0.1 --set ppo.kl_horizon=20 "
    "--learning-rate 1e-2 --data {data}/train.jsonl --per-device-train-batch-size 2 "
    "--gradient-accumulation-steps 2 --save-steps 3 --max-steps 12 --max-dropped 0.2 --logging-steps 4",
)
FULL = case(
    "ppo-full",
    "--plugin chatml --plugin ppo --plugin packed --set packed.length=96 --plugin reward-regex "
    "--set reward-regex.pattern=.*e.* --set reward-regex.match=search --set ppo.response_length=5 "
    "--set ppo.num_ppo_epochs=2 --set ppo.kl_target=0.1 --set ppo.kl_horizon=20 --learning-rate 1e-3 "
    "--data {data}/train.jsonl --per-device-train-batch-size 2 --save-steps 1 --max-steps 6 --max-dropped 0.2",
)


def coefficients(out: Path) -> list[float]:
    return [line["objective/kl_coef"] for line in lines(out / "metrics.jsonl") if line["event"] == "step"]


@pytest.mark.parametrize("step", [2, 5, 7, 9])
def test_a_run_goes_on_from_within_a_window_and_from_between_two(
    runs: Runs, sftx: Sftx, step: int, tmp_path: Path
) -> None:
    """Checkpoints are those of step 3, within a window of four steps, of 6 and of 9; before step 3 there is none."""
    directory, whole = interrupted(runs, sftx, PPO, step)
    assert sftx(PPO, directory, "--resume").exit_code == 0
    assert differences(whole, directory / "out") == []
    assert len(set(coefficients(whole))) == 3
    assert (whole / "adapter" / "loss" / "module.safetensors").exists()


def test_a_whole_model_goes_on_too(runs: Runs, sftx: Sftx) -> None:
    directory, whole = interrupted(runs, sftx, FULL, 4)
    assert sftx(FULL, directory, "--resume").exit_code == 0
    assert differences(whole, directory / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_a_random_instant_ends_the_same(runs: Runs, seed: int) -> None:
    killed = runs.killed(PPO, random.Random(f"ppo {seed}"))
    assert killed.codes[-1] == 0, str(killed)
    assert differences(runs.undisturbed(PPO)[0], killed.output_dir) == [], killed.story


def test_answers_are_in_the_run_directory(runs: Runs, sftx: Sftx) -> None:
    directory = runs.directory("answers")
    assert sftx(PPO, directory).exit_code == 0
    text = (directory / "out" / "rollouts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    windows = [[row for row in rows if row["step"] == step] for step in (0, 4)]
    assert [len(window) for window in windows] == [8, 8]  # two steps of four prompts
    assert all(row["rewards"].keys() == {"reward-regex"} for row in rows)
