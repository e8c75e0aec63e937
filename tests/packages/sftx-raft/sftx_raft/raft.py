"""The rollout `raft`: reward-ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from sftx import Answer, ConfigError, Policy, Question, Rollout, Rollouts, hookimpl


@dataclass(frozen=True, eq=False)
class Raft:
    """Answers each question several times, and trains on the best answer and on others that beat the mean so far."""

    candidates: Annotated[int, Field(ge=2, description="Answers to each question.")] = 4
    keep: Annotated[int, Field(ge=1, description="Most answers to a question that are trained.")] = 1
    answer_length: Annotated[int, Field(ge=1, description="Largest length of an answer, in tokens.")] = 64
    temperature: Annotated[float, Field(gt=0, description="Logits are divided by it where answers are sampled.")] = 1.0
    memory: Annotated[
        float, Field(ge=0, lt=1, description="Share of the mean reward so far that each window keeps.")
    ] = 0.9

    @hookimpl
    def sftx_validate(self) -> None:
        if self.keep > self.candidates:
            raise ConfigError(
                f"option 'keep': is {self.keep}, and there are {self.candidates} candidates; give at most that"
            )

    @hookimpl
    def sftx_rollout(self) -> Rollout:
        return RankedAnswers(self)


class RankedAnswers:
    """Makes the examples of a window, and remembers how good answers were."""

    steps_per_rollout = 1
    num_iterations = 1
    needs_reward = True

    def __init__(self, options: Raft) -> None:
        self._options = options
        self.num_answers = options.keep
        self.max_new_tokens = options.answer_length
        self._mean: float | None = None

    def state_dict(self) -> Mapping[str, Any]:
        return {"mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean = state["mean"]

    def __call__(self, policy: Policy, questions: Sequence[Question]) -> Rollouts:
        options = self._options
        groups = policy.generate(
            questions,
            num_answers=options.candidates,
            max_new_tokens=options.answer_length,
            temperature=options.temperature,
        )
        answers = [answer for group in groups for answer in group]
        mean = sum(answer.reward for answer in answers) / len(answers)
        kept = [self._best(group) for group in groups]
        before = mean if self._mean is None else self._mean
        self._mean = options.memory * before + (1 - options.memory) * mean
        return Rollouts(
            examples=[answer.example(number) for number, group in enumerate(kept) for answer in group],
            answers=answers,
            metrics={
                "reward": mean,
                "reward_kept": sum(group[0].reward for group in kept) / len(kept),
                "answers_kept": sum(map(len, kept)) / len(kept),
            },
        )

    def _best(self, group: Sequence[Answer]) -> list[Answer]:
        """Return the best answer, then those that beat the mean so far; of the same reward, the first ones."""
        ranked = sorted(group, key=lambda answer: -answer.reward)[: self._options.keep]
        return [a for n, a in enumerate(ranked) if n == 0 or (self._mean is not None and a.reward > self._mean)]
