"""Rewards and the rollout as stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sftx.assembly.stages.evaluation_stages import named_scores
from sftx.assembly.stages.loss_stage import RESERVED_METRICS
from sftx.assembly.stages.stage import Stage, is_number, not_json
from sftx.errors import PluginError, counted
from sftx.types import Answer, Example, LanguageModel, Policy, Question, Reward, Rollout, Rollouts


class RewardStage(Stage):
    """Scores answers, and checks that each has a finite number or None."""

    def __init__(self, plugin: str, reward: Reward) -> None:
        super().__init__(plugin)
        self._reward = reward

    def prepare(self, lm: LanguageModel) -> None:
        """Give a reward that computes with a model the model of the run."""
        prepare: Any = getattr(self._reward, "prepare", None)
        if prepare is not None:
            with self._attribute("prepare"):
                prepare(lm)

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        with self._attribute("reward"):
            scores: Any = self._reward(answers)
        try:
            listed: list[Any] = list(scores)
        except TypeError:
            raise self._refuse(f"reward returned {type(scores).__name__}, expected a list of numbers") from None
        if len(listed) != len(answers):
            raise self._refuse(f"reward returned {counted(len(listed), 'score')} for {counted(len(answers), 'answer')}")
        for answer, score in zip(answers, listed, strict=True):
            if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
                raise self._refuse(
                    f"reward of an answer to {answer.question.row_id} is {score!r:.60}, expected a finite number, or "
                    "None to decline it"
                )
        return [None if score is None else float(score) for score in listed]


class RolloutStage(Stage):
    """Makes the examples of a window, and checks that each step has some and that a checkpoint can hold them."""

    def __init__(self, plugin: str, rollout: Rollout) -> None:
        super().__init__(plugin)
        self._rollout = rollout
        with self._attribute("reading what it declares"):
            self.steps_per_rollout = rollout.steps_per_rollout
            self.num_iterations = rollout.num_iterations
            self.num_answers = rollout.num_answers
            self.max_new_tokens = rollout.max_new_tokens
            self.reward_weights: Any = getattr(rollout, "reward_weights", {})
            self.needs_reward: Any = getattr(rollout, "needs_reward", False)
        if not isinstance(self.needs_reward, bool):
            raise self._refuse(f"needs_reward is {self.needs_reward!r:.40}, expected True or False")
        for name in ("steps_per_rollout", "num_iterations", "num_answers", "max_new_tokens"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise self._refuse(f"{name} is {value!r:.40}, expected a whole number of at least 1")
        weights: Any = self.reward_weights
        is_right = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
        if not is_right or not all(is_number(value) and math.isfinite(value) for value in weights.values()):
            raise self._refuse(f"reward_weights is {weights!r:.60}, expected finite numbers by names of reward plugins")

    def state_dict(self) -> dict[str, Any]:
        """Return what the rollout remembers between two windows, as JSON values; {} for one that remembers nothing."""
        own: Any = getattr(self._rollout, "state_dict", None)
        if own is None:
            return {}
        with self._attribute("state_dict"):
            state: Any = own()
        if not isinstance(state, Mapping):
            raise self._refuse(f"state_dict returned {type(state).__name__}, expected a mapping")
        if reason := not_json(dict(state), "state_dict"):
            raise self._refuse(reason)
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        own: Any = getattr(self._rollout, "load_state_dict", None)
        if own is not None and state:
            with self._attribute("load_state_dict"):
                own(state)

    def __call__(self, policy: Policy, questions: Sequence[Question], rows_per_step: int) -> Rollouts:
        """Make the examples of the questions, of which `rows_per_step` are for each step."""
        with self._attribute("rollout"):
            made: Any = self._rollout(policy, questions)
        if not isinstance(made, Rollouts):
            raise self._refuse(f"rollout returned {type(made).__name__}, expected Rollouts")
        groups = []
        for example in made.examples:
            if not isinstance(example, Example):
                raise self._refuse(f"rollout gave {example!r:.60}, expected an Example")
            group: Any = example.group
            if not (isinstance(group, int) and 0 <= group < len(questions)):
                raise self._refuse(
                    f"rollout gave {example.row_id} the group {group!r:.40}, expected the position of its question, "
                    f"from 0 to {len(questions) - 1}"
                )
            if reason := not_json(dict(example.extras), "extras"):
                raise self._refuse(f"rollout gave {example.row_id} {reason}")
            groups.append(group)
        if groups != sorted(groups):
            raise self._refuse("rollout gave examples in another order than their questions; sort them by group")
        steps = {group // rows_per_step for group in groups}
        if missing := [step for step in range(-(-len(questions) // rows_per_step)) if step not in steps]:
            first = missing[0] * rows_per_step
            raise self._refuse(
                f"rollout gave no example for the questions {first} to "
                f"{min(len(questions), first + rows_per_step) - 1}, which are the rows of a step"
            )
        if not all(isinstance(answer, Answer) for answer in made.answers):
            raise self._refuse("rollout gave answers of another type than Answer")
        try:
            metrics = named_scores("", made.metrics, "a window") if made.metrics else {}
        except PluginError as error:
            raise self._refuse(str(error)) from None
        if taken := sorted(metrics.keys() & RESERVED_METRICS):
            raise self._refuse(f"metrics has the name {taken[0]!r}, which the trainer reports itself; choose another")
        return Rollouts(tuple(made.examples), tuple(made.answers), metrics)
