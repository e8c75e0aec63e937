"""The rollout of PPO: answers with their log-probabilities, values, rewards of tokens, advantages and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sftx import Answer, Batch, Example, LanguageModel, Policy, Question, Rollouts, load_model
from sftx_plugins.reinforcement.advantages import (
    KLController,
    Values,
    advantages,
    estimated_kl,
    token_rewards,
    whiten,
)
from sftx_plugins.reinforcement.ppo_loss import ADVANTAGES, LOG_PROBS, RETURNS, VALUES, log_probs, values_of
from sftx_plugins.reinforcement.reported import lengths_of, rewards_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PPORollout:
    """Makes the examples of a window. The coefficient of the KL penalty is what it remembers between two of them."""

    num_answers: int
    max_new_tokens: int
    sampling: Mapping[str, Any]
    """Other options of `Policy.generate`; its temperature is that of the loss."""
    temperature: float
    reward_weights: Mapping[str, float]
    missing_eos_penalty: float
    steps_per_rollout: int
    num_iterations: int
    controller: KLController
    kl_estimator: Literal["k1", "k3"]
    reference_model: str
    """The reference of a run without adapters."""
    is_reference_given: bool
    """Whether it is the reference of a run with adapters too."""
    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_advantages: bool
    reference: LanguageModel | None = field(default=None, init=False)
    needs_reward = True

    def state_dict(self) -> Mapping[str, Any]:
        return {"kl_coef": self.controller.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller.coefficient = float(state["kl_coef"])

    def __call__(self, policy: Policy, questions: Sequence[Question]) -> Rollouts:
        groups = policy.generate(
            questions,
            num_answers=self.num_answers,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            **self.sampling,
        )
        answers = [answer for group in groups for answer in group]
        plain = [answer.example(number) for number, group in enumerate(groups) for answer in group]
        lengths = [len(answer.token_ids) for answer in answers]

        def of_answers(numbers: Sequence[Any]) -> list[Values]:
            """Return the numbers of the answers' own tokens, which are the last ones."""
            return [np.asarray(one[-length:], np.float64) for one, length in zip(numbers, lengths, strict=True)]

        def computed(lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
            hidden_BTD = lm.hidden(batch).hidden_BTD
            return {
                LOG_PROBS: log_probs(lm, batch, hidden_BTD, self.temperature)[0],
                VALUES: values_of(lm, hidden_BTD),
            }

        by_example = policy.per_token(plain, computed)
        old = of_answers([one[LOG_PROBS] for one in by_example])
        values = of_answers([one[VALUES] for one in by_example])
        kl = self._divergences(policy, plain, old, of_answers)

        scores = [answer.reward - self._penalty(answer) for answer in answers]
        coefficient = self.controller.coefficient
        rewards = [token_rewards(kl_A, coefficient, score) for kl_A, score in zip(kl, scores, strict=True)]
        if self.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        estimates = [
            advantages(rewards_A, values_A, gamma=self.gamma, lam=self.lam)
            for rewards_A, values_A in zip(rewards, values, strict=True)
        ]
        returns = [estimates_A + values_A for estimates_A, values_A in zip(estimates, values, strict=True)]
        given = whiten(estimates) if self.whiten_advantages else estimates

        numbers: dict[str, list[Values]] = {LOG_PROBS: old, VALUES: values, RETURNS: returns, ADVANTAGES: given}
        examples = [
            answer.example(
                example.group,
                {name: _padded(arrays[place], len(example.token_ids)) for name, arrays in numbers.items()},
            )
            for place, (answer, example) in enumerate(zip(answers, plain, strict=True))
        ]
        divergence = _mean([kl_A.sum() for kl_A in kl])
        penalty = -coefficient * divergence
        metrics = {
            **rewards_of(answers),
            **lengths_of(answers),
            "kl": float(sum(kl_A.sum() for kl_A in kl) / sum(lengths)),
            "objective/kl": divergence,
            "objective/entropy": _mean([-old_A.sum() for old_A in old]),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + _mean(scores),
            "objective/scores": _mean(scores),
            "objective/kl_coef": coefficient,
            "val/num_eos_tokens": float(sum(answer.finish_reason == "stop" for answer in answers)),
            "val/explained_variance": _explained(np.concatenate(values), np.concatenate(returns)),
        }
        self.controller.update(divergence, len(answers))
        return Rollouts(examples, answers, metrics)

    def _penalty(self, answer: Answer) -> float:
        return 0.0 if answer.finish_reason == "stop" else self.missing_eos_penalty

    def _divergences(
        self, policy: Policy, examples: Sequence[Example], old: Sequence[Values], of_answers: Any
    ) -> list[Values]:
        """Return the estimated divergence from the reference for each token; 0 where nothing is compared."""
        if self.controller.coefficient == 0:
            return [np.zeros_like(old_A) for old_A in old]
        without_adapters = bool(policy.lm.adapters) and not self.is_reference_given
        if not without_adapters and self.reference is None:
            self.reference = load_model(self.reference_model, like=policy.lm)
        reference = of_answers(
            policy.log_probs(
                examples,
                temperature=self.temperature,
                lm=self.reference,
                without_adapters=without_adapters,
            )
        )
        return [
            estimated_kl(old_A, reference_A, self.kl_estimator)
            for old_A, reference_A in zip(old, reference, strict=True)
        ]


def _padded(values_A: Values, length: int) -> list[float]:
    """Return one number for each of the example's tokens: 0 for those of the prompt."""
    return [0.0] * (length - len(values_A)) + [float(value) for value in values_A.astype(np.float32)]


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))


def _explained(values: Values, returns: Values) -> float:
    """Return the share of the returns' variance that the values explain: 1 at best, below 0 when they mislead."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else 0.0
