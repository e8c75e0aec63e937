"""Runs of PPO: with every kind of model and layout, split into micro-batches, and long enough to learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reward_functions
import sftx
from sftx import Conversation, Message
from sftx.checkpoint.load_run import load_run
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.testing.runs import run_tiny

HELPERS = Path(__file__).parents[1] / "helpers"
LETTERS: dict[str, Any] = {"reward-function.function": f"{HELPERS / 'reward_functions.py'}:letters"}
WORDS = ("red", "green", "blue", "seven", "please", "night", "house", "river", "count", "speak")


def prompts(number: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"prompt": " ".join(rng.choices(WORDS, k=rng.randint(2, 6))), "completion": "yes"} for _ in range(number)]


def trained(directory: Path, *names: str, **settings: Any) -> Path:
    given = {
        "train.max_steps": 4,
        "train.learning_rate": 1e-3,
        "train.lr_scheduler_type": "constant",
        "ppo.response_length": 6,
        "data.eval": [],
        **LETTERS,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    result = run_tiny([*names, "ppo", "reward-function"], directory, rows=prompts(32, 0), settings=given)
    return result.output_dir


def steps(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == "step"]


@pytest.mark.parametrize(
    "names", [("lora", "packed"), ("packed",), ("freeze",)], ids=lambda names: "-".join(names) or "full"
)
def test_it_trains_policy_and_values_and_the_result_answers(names: tuple[str, ...], tmp_path: Path) -> None:
    out = trained(tmp_path, *names, ppo__num_ppo_epochs=2, ppo__num_generations=2)
    lines = steps(out)
    assert [line["objective/kl"] == 0 for line in lines] == [True, True, False, False]  # the reference, then another
    assert lines[0]["policy/approxkl_avg"] < 1e-8 < lines[1]["policy/approxkl_avg"]
    for line in lines:
        assert line["rewards/reward-function/mean"] == pytest.approx(line["objective/scores"])
    artefact = out / ("adapter" if "lora" in names else "model")
    head = load_file(artefact / "loss" / "module.safetensors")
    assert head["weight"].abs().max() > 0
    loaded = load_run(out)
    assert loaded.answer([[5, 6, 7]], max_new_tokens=3)
    assert loaded.merge_adapters() == ("lora" in names)


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"  # what an answer draws depends on the place of its row
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts(32, 0)), encoding="utf-8")
    options: dict[str, Any] = {"train__train_batch_size": 8, "ppo__num_ppo_epochs": 2, "train__max_steps": 6}
    options |= {"data__train": [str(rows)]}
    whole = steps(trained(tmp_path / "8", "lora", train__per_device_train_batch_size=8, **options))
    split = steps(trained(tmp_path / "2", "lora", train__per_device_train_batch_size=2, **options))
    names = ("loss", "loss/policy_avg", "loss/value_avg", "objective/kl", "objective/scores", "entropy")
    for one, other in zip(whole, split, strict=True):
        assert {name: other[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-5)
    assert len({line["loss"] for line in whole}) == 6


@pytest.mark.parametrize("adapter", [["lora"], []], ids=["lora", "full"])
def test_its_memory_can_be_planned(adapter: list[str], tiny_model: Path) -> None:
    plugins = ["chatml", *adapter, "ppo", "reward-exact-match"]
    plan = sftx.plan(model=str(tiny_model), data=prompts(8, 0), plugins=plugins, use_cpu=True)
    assert any("every question has 1 examples" in line for line in plan.assumptions)
    assert (plan.tokens_per_second or 0) > 0


def mean_reward(out: Path) -> float:
    """Return the mean reward of sampled answers to prompts that are not among the training rows."""
    loaded = load_run(out)
    held_out = [row for row in prompts(64, 1) if row not in prompts(64, 0)]
    requests = [
        Request(
            loaded.prompt(Conversation((Message("user", row["prompt"]),))), Sampling(8, 0.7, 0, 1.0, 0.0, seed=number)
        )
        for number, row in enumerate(held_out * 2)
    ]
    with torch.no_grad():
        done = list(Decoder(loaded.lm, stop_ids=loaded.stop_ids, max_rows=64).run(requests))
    texts = [str(loaded.tokenizer.decode(one.answer_ids, skip_special_tokens=True)) for one in done]
    return sum(map(reward_functions.letters, texts)) / len(texts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_it_raises_the_reward_of_answers_to_other_prompts(seed: int, tmp_path: Path) -> None:
    """A random model writes an `e` every tenth character; measured 0.09 before, 0.28 to 0.41 after 120 steps."""
    options: dict[str, Any] = {
        "ppo__response_length": 8,
        "train__train_batch_size": 32,
        "train__per_device_train_batch_size": 32,
        "train__seed": seed,
    }
    before = mean_reward(trained(tmp_path / "1", train__learning_rate=1e-9, train__max_steps=1, **options))
    after = mean_reward(trained(tmp_path / "120", train__max_steps=120, ppo__kl_coef=0.01, **options))
    assert before < 0.15
    assert after > 2 * before
