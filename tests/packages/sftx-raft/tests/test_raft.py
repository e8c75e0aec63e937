"""The contracts, a run of two steps that resumes, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sftx import Answer, ConfigError, Question
from sftx.testing import Result, check_reward, check_rollout

from sftx_raft import Raft, WordOverlap

QUESTION = Question("rows:1", "Name a colour and a number.", [1, 2], "red seven")


def answers(*rewards: float) -> list[Answer]:
    return [Answer(QUESTION, n, "", (3 + n,), (-1.0,), "stop", reward=reward) for n, reward in enumerate(rewards)]


class Policy:
    """Gives the same answers to each question."""

    def __init__(self, *rewards: float) -> None:
        self.rewards = rewards

    def generate(self, questions: list[Question], **options: Any) -> list[list[Answer]]:
        return [answers(*self.rewards) for _ in questions]


@pytest.mark.parametrize("plugin", [Raft(answer_length=8), Raft(candidates=3, keep=2, answer_length=4, memory=0.5)])
def test_the_contract_of_a_rollout(plugin: Raft) -> None:
    check_rollout(plugin)


def test_the_contract_of_a_reward() -> None:
    check_reward(WordOverlap())
    check_reward(WordOverlap(repetition=0))


def test_a_run_trains_on_what_it_keeps(plugin_run: Callable[..., Result]) -> None:
    options: dict[str, Any] = {"raft__answer_length": 6, "raft__candidates": 3, "raft__keep": 2}
    assert plugin_run("lora", "raft", "word-overlap", **options).summary["num_steps"] == 2


def test_the_best_answers_are_kept() -> None:
    rollout = Raft(candidates=4, keep=3).sftx_rollout()
    policy: Any = Policy(0.0, 1.0, 0.4, 0.6)
    first = rollout(policy, [QUESTION, QUESTION])
    assert [example.token_ids.tolist() for example in first.examples] == [[1, 2, 4]] * 2, "no mean is known yet"
    second = rollout(policy, [QUESTION])
    assert [example.token_ids.tolist() for example in second.examples] == [[1, 2, 4], [1, 2, 6]]
    assert second.metrics == {"reward": 0.5, "reward_kept": 1.0, "answers_kept": 2.0}


def test_words_count_once() -> None:
    score = WordOverlap(repetition=0.5).sftx_reward()

    def answer(text: str) -> Answer:
        return Answer(QUESTION, 0, text, (3,), (-1.0,), "stop")

    assert score([answer("Red"), answer("seven red"), answer("red red"), answer("")]) == [0.5, 1.0, 0.25, 0.0]


def test_more_cannot_be_kept_than_there_are(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="option 'keep': is 5, and there are 4 candidates"):
        Raft(keep=5).sftx_validate()
