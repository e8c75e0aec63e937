"""Group relative policy optimisation: answers to one question are compared with one another by their rewards.

GRPO is of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300); `dr_grpo` is of Liu et al. 2025 (2503.20783), `dapo` of Yu
et al. 2025 (2503.14476), and importance sampling by sequence is GSPO's (Zheng et al. 2025, 2507.18071). Options,
metrics and formulas are those of TRL's GRPOTrainer.

Dimensions: B rows, T tokens, N = B*T, E examples of a batch, Q questions, G answers to each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sftx import (
    IGNORE_INDEX,
    Answer,
    Batch,
    ConfigError,
    Example,
    Loss,
    LossSum,
    Policy,
    Question,
    Rollout,
    Rollouts,
    RunInfo,
    hookimpl,
    per_label,
    sum_by_example,
)
from sftx_plugins.reinforcement.reported import lengths_of, rewards_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sftx import LanguageModel

_NO_TOKENS = 1e-9
"""The denominator of a batch without a label token, so that a step of such batches alone has the loss 0."""


@dataclass(frozen=True, eq=False)
class Grpo:
    """GRPO: several sampled answers to each question, each trained by how much better its reward is than the mean."""

    num_generations: Annotated[int, Field(ge=2, le=10**4, description="Answers to each question.")] = 8
    max_completion_length: Annotated[
        int, Field(ge=1, le=2**24, description="Largest length of an answer, in tokens.")
    ] = 256
    temperature: Annotated[
        float, Field(gt=0, description="Logits are divided by it, where answers are sampled and in the loss.")
    ] = 1.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description="Draw from the likeliest tokens that together have this probability.")
    ] = 1.0
    top_k: Annotated[
        int, Field(ge=0, le=2**24, description="Draw from this many of the likeliest tokens; 0: from all.")
    ] = 0
    min_p: Annotated[
        float, Field(ge=0, le=1, description="Draw from tokens with this share of the likeliest one's probability.")
    ] = 0.0
    beta: Annotated[float, Field(ge=0, description="Weight of the KL to the reference; 0 needs no reference.")] = 0.0
    use_bias_correction_kl: Annotated[
        bool, Field(description="Multiply the KL by the ratio of probabilities, as DeepSeek-V3.2 does.")
    ] = True
    reference_model: Annotated[
        str | None,
        Field(description="Directory or hub id of the reference; by default the model as it was before training."),
    ] = None
    epsilon: Annotated[
        float, Field(ge=0, le=1, description="Ratios of probabilities below 1 - epsilon are clipped.")
    ] = 0.2
    epsilon_high: Annotated[
        float | None, Field(ge=0, description="Ratios above 1 + epsilon_high are clipped; by default epsilon.")
    ] = None
    delta: Annotated[
        float | None, Field(gt=1, description="Bound of ratios of answers worse than the mean, too (INTELLECT-2).")
    ] = None
    importance_sampling_level: Annotated[
        Literal["token", "sequence"], Field(description="Ratios of single tokens, or of whole answers (GSPO).")
    ] = "token"
    loss_type: Annotated[
        Literal["dapo", "grpo", "bnpo", "dr_grpo"],
        Field(
            description="What a sum over tokens is divided by. dapo and bnpo: the tokens of all answers of the step; "
            "grpo: the tokens of each answer, so that all answers count the same; dr_grpo: max_completion_length."
        ),
    ] = "dapo"
    scale_rewards: Annotated[
        Literal["group", "batch", "none"],
        Field(description="Divide advantages by the standard deviation of the group's or the window's rewards."),
    ] = "group"
    mask_truncated_completions: Annotated[bool, Field(description="Do not train answers that were cut off.")] = False
    steps_per_generation: Annotated[
        int, Field(ge=1, le=10**4, description="Optimizer steps that the answers of a window are divided into.")
    ] = 1
    num_iterations: Annotated[
        int, Field(ge=1, le=10**4, description="How often the steps of a window are trained.")
    ] = 1
    reward_weights: Annotated[
        Mapping[str, float], Field(description="Weights of rewards by the name of their plugin; 1 where there is none.")
    ] = field(default_factory=dict)

    @hookimpl
    def sftx_validate(self) -> None:
        if self.reference_model is not None and self.beta == 0:
            raise ConfigError("reference_model: without beta no reference is used; set beta, or leave it out")

    @hookimpl
    def sftx_rollout(self, run: RunInfo) -> Rollout:
        return GroupRollout(self, self.reference_model or run.config["model"])

    @hookimpl
    def sftx_loss(self) -> Loss:
        return GrpoLoss(self)


class GroupRollout:
    """Answers each question `num_generations` times, and compares the answers' rewards."""

    needs_reward = True

    def __init__(self, options: Grpo, reference: str) -> None:
        self._options = options
        self._reference_name = reference
        self._reference: LanguageModel | None = None
        self.steps_per_rollout = options.steps_per_generation
        self.num_iterations = options.num_iterations
        self.num_answers = options.num_generations
        self.max_new_tokens = options.max_completion_length
        self.reward_weights = options.reward_weights

    def __call__(self, policy: Policy, questions: Sequence[Question]) -> Rollouts:
        options = self._options
        groups = policy.generate(
            questions,
            num_answers=options.num_generations,
            max_new_tokens=options.max_completion_length,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
        )
        answers = [answer for group in groups for answer in group]
        advantages, metrics = advantages_of(groups, options.scale_rewards)
        examples = [
            answer.example(number // options.num_generations, {"advantage": advantage})
            for number, (answer, advantage) in enumerate(zip(answers, advantages, strict=True))
        ]
        if options.mask_truncated_completions:
            examples = [
                dataclasses.replace(example, loss_mask=[False] * len(example.token_ids))  # type: ignore[arg-type]
                if answer.finish_reason == "length"
                else example
                for example, answer in zip(examples, answers, strict=True)
            ]
        if options.steps_per_generation * options.num_iterations > 1:  # otherwise the ratio is 1 to the policy itself
            old = policy.log_probs(examples, temperature=options.temperature)
            examples = _with(examples, "old_log_probs", old)
        if options.beta:
            examples = _with(examples, "ref_log_probs", self._reference_log_probs(policy, examples))
        return Rollouts(examples, answers, {**metrics, **lengths_of(answers)})

    def _reference_log_probs(self, policy: Policy, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        temperature = self._options.temperature
        if policy.lm.adapters and self._options.reference_model is None:
            return policy.log_probs(examples, temperature=temperature, without_adapters=True)
        if self._reference is None:
            from sftx import load_model

            self._reference = load_model(self._reference_name, like=policy.lm)
        return policy.log_probs(examples, temperature=temperature, lm=self._reference)


def _with(examples: Sequence[Example], name: str, values: Sequence[NDArray[np.float32]]) -> list[Example]:
    """Return the examples with a number for each token among their extras."""
    return [
        dataclasses.replace(example, extras={**example.extras, name: of_example.tolist()})
        for example, of_example in zip(examples, values, strict=True)
    ]


def advantages_of(
    groups: Sequence[Sequence[Answer]], scale_rewards: Literal["group", "batch", "none"]
) -> tuple[list[float], dict[str, float]]:
    """Return the advantage of each answer, group after group, and what is reported of their rewards.

    An advantage is the reward less the mean of its group, divided by a standard deviation. An answer that every reward
    declined is left out of both, and has the advantage 0.
    """
    import numpy as np

    rewards_QG = np.array([[a.reward if a.rewards else math.nan for a in group] for group in groups], np.float64)
    means_Q = np.array([_mean(rewards) for rewards in rewards_QG])
    group_std_Q = np.array([_std(rewards) for rewards in rewards_QG])
    advantages_QG = rewards_QG - means_Q[:, None]
    if scale_rewards == "batch":
        advantages_QG = advantages_QG / (_std(rewards_QG) + 1e-4)
    elif scale_rewards == "group":
        advantages_QG = advantages_QG / (group_std_Q[:, None] + 1e-4)
    metrics = rewards_of([answer for group in groups for answer in group])
    metrics["frac_reward_zero_std"] = float(np.mean(group_std_Q <= 1e-8))
    return np.nan_to_num(advantages_QG, nan=0.0).flatten().tolist(), metrics


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the numbers that are not NaN; 0 without any."""
    known = values[values == values]
    return float(known.mean()) if known.size else 0.0


def _std(values: NDArray[np.float64]) -> float:
    """Return the unbiased standard deviation of the numbers that are not NaN; 0 for fewer than two."""
    known = values[values == values]
    return float(known.std(ddof=1)) if known.size > 1 else 0.0


class GrpoLoss:
    """Raises the probability of answers with a positive advantage, and lowers that of the others."""

    shares_prefixes = True

    def __init__(self, options: Grpo) -> None:
        self._options = options
        # The ratio to the policy itself is 1, and has a gradient.
        self.detached = options.steps_per_generation * options.num_iterations == 1
        self._low = 1 - options.epsilon
        self._high = 1 + (options.epsilon if options.epsilon_high is None else options.epsilon_high)

    def denominator(self, batch: Batch) -> float:
        if self._options.loss_type in ("grpo", "dr_grpo"):
            return float(len(batch.row_ids))
        return float(batch.num_label_tokens) or _NO_TOKENS

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """Return advantages and label tokens, [E]; log-probabilities before the step and of the reference, [B, T]."""
        import torch

        examples = batch.examples
        if missing := [example.row_id for example in examples if "advantage" not in example.extras]:
            raise ConfigError(f"{missing[0]}: has no advantage, which the rollout of grpo gives its examples")
        extras = {
            "advantages": torch.tensor([float(example.extras["advantage"]) for example in examples]),
            "num_tokens": torch.tensor([float(example.num_label_tokens) for example in examples]),
        }
        extras["advantages_of_tokens"] = per_label(
            batch, [[example.extras["advantage"]] * len(example.token_ids) for example in examples]
        )
        for name in ("old_log_probs", "ref_log_probs"):
            if name in examples[0].extras:
                extras[name] = per_label(batch, [example.extras[name] for example in examples])
        return extras

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        options, extras = self._options, batch.extras
        hidden = lm.hidden(batch)
        out = lm.cross_entropy(
            hidden.hidden_BTD,
            batch.labels_BT,
            num_valid=batch.num_label_tokens,
            reduction="none",
            stats=True,
            temperature=options.temperature,
        )
        log_probs_N = -out.loss
        is_label_N = batch.labels_BT.flatten() != IGNORE_INDEX
        num_tokens_E = extras["num_tokens"]
        weights_BT = batch.token_weights_BT
        weights_N = torch.ones_like(log_probs_N) if weights_BT is None else weights_BT.flatten()
        old_N = extras["old_log_probs"].flatten() if "old_log_probs" in extras else log_probs_N.detach()
        kl_N = torch.zeros_like(log_probs_N)
        if options.beta:
            difference_N = (extras["ref_log_probs"].flatten() - log_probs_N).masked_fill(~is_label_N, 0)
            kl_N = (difference_N.exp() - difference_N - 1) * options.beta
        log_ratio_N = log_probs_N - old_N
        if options.importance_sampling_level == "token":
            ratio_N, advantages_N = log_ratio_N.exp(), extras["advantages_of_tokens"].flatten()
            loss_N, clipped_N = self._surrogate(ratio_N, advantages_N)
            loss_E = sum_by_example(batch, (loss_N + kl_N * self._kl_factor(ratio_N)) * weights_N)
            clipped = {name: (where & is_label_N).sum() for name, where in clipped_N.items()}
            num_ratios = is_label_N.sum()
        else:
            ratio_E = (sum_by_example(batch, log_ratio_N) / num_tokens_E.clamp(min=1)).exp()
            of_answer_E, clipped = self._surrogate(ratio_E, extras["advantages"])
            kl_E = sum_by_example(batch, kl_N * weights_N) * self._kl_factor(ratio_E)
            loss_E = of_answer_E * sum_by_example(batch, weights_N) + kl_E
            num_ratios = torch.tensor(len(num_tokens_E), device=loss_E.device)
        num_labels = is_label_N.sum().float()
        assert out.entropy_N is not None
        metrics: dict[str, Any] = {
            f"clip_ratio/{name}": (where.sum().float(), num_ratios.float()) for name, where in clipped.items()
        }
        metrics["entropy"] = (out.entropy_N.float().masked_fill(~is_label_N, 0).sum(), num_labels)
        if options.beta:
            factor_N = 1.0 if options.importance_sampling_level == "sequence" else self._kl_factor(log_ratio_N.exp())
            metrics["kl"] = ((kl_N * factor_N).masked_fill(~is_label_N, 0).detach().sum() / options.beta, num_labels)
        if options.loss_type == "grpo":
            loss_E = loss_E / num_tokens_E.clamp(min=1)
        elif options.loss_type == "dr_grpo":
            loss_E = loss_E / options.max_completion_length
        return LossSum(loss_E.sum(), hidden.aux_loss, metrics)

    def _kl_factor(self, ratio: Tensor) -> Tensor | float:
        """Return what the KL of a token is multiplied by, so that its gradient has no bias off the policy."""
        return ratio if self._options.use_bias_correction_kl else 1.0

    def _surrogate(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped loss of each ratio, and where it is clipped."""
        import torch

        clipped = ratio.clamp(self._low, self._high)
        bounded = ratio if self._options.delta is None else ratio.clamp(max=self._options.delta)
        loss = -torch.minimum(bounded * advantages, clipped * advantages)
        low, high = (ratio < self._low) & (advantages < 0), (ratio > self._high) & (advantages > 0)
        return loss, {"low_mean": low, "high_mean": high, "region_mean": low | high}
