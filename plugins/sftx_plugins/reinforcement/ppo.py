"""PPO (Schulman et al. 2017, arXiv:1707.06347) on answers that the model samples while it trains.

This module holds the options; `ppo_rollout` makes a window of examples, `ppo_loss` trains on them, and
`advantages` has the formulas between the two. Both need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from sftx import ConfigError, Loss, Rollout, RunInfo, hookimpl


@dataclass(frozen=True, eq=False)
class PPO:
    """Raises the reward of sampled answers by PPO, with a value head, and a penalty on leaving the reference.

    Rows are prompts; at least one reward plugin scores the answers (`--plugin reward-exact-match`). The value head is a
    linear function of the last hidden states, trained with the model and saved beside the result, in `loss`. The
    reference is the model without its adapters; in full fine-tuning, the model that the run began with.
    """

    response_length: Annotated[int, Field(ge=1, le=2**30, description="Largest length of an answer, in tokens.")] = 53
    num_generations: Annotated[int, Field(ge=1, le=10**6, description="Sampled answers to each prompt.")] = 1
    temperature: Annotated[
        float, Field(gt=0, le=100, description="Logits are divided by it, where answers are sampled and in the loss.")
    ] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1, description="Sample from the likeliest tokens of this share.")] = 1.0
    top_k: Annotated[
        int, Field(ge=0, le=2**24, description="Sample from so many of the likeliest tokens; 0: from all.")
    ] = 0
    min_p: Annotated[
        float, Field(ge=0, le=1, description="Sample from tokens that are at least so likely, as a share of the first.")
    ] = 0.0
    reward_weights: Annotated[
        Mapping[str, float], Field(description="Weights of rewards by the name of their plugin; 1 for others.")
    ] = field(default_factory=dict)
    missing_eos_penalty: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False, description="Taken from the reward of an answer that was cut off."),
    ] = None

    steps_per_rollout: Annotated[
        int,
        Field(ge=1, le=10**6, description="Optimizer steps that the answers of a window make, one after the other."),
    ] = 1
    num_ppo_epochs: Annotated[
        int, Field(ge=1, le=10**6, description="How often a window is trained on before the next one is sampled.")
    ] = 4

    kl_coef: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Penalty on a token's KL divergence from the reference.")
    ] = 0.05
    kl_estimator: Annotated[
        Literal["k1", "k3"],
        Field(description="Of that divergence: k1, the log-ratio, or k3, of less variance and never below 0."),
    ] = "k1"
    kl_target: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="KL divergence of an answer, in nats, towards which kl_coef is adapted; fixed by default.",
        ),
    ] = None
    kl_horizon: Annotated[
        int, Field(ge=1, le=10**9, description="Answers over which kl_coef is adapted to kl_target; fewer are faster.")
    ] = 10000
    reference_model: Annotated[
        str | None,
        Field(min_length=1, description="Another reference: a directory or hub id of a model of the same tokenizer."),
    ] = None

    gamma: Annotated[float, Field(ge=0, le=1, description="Discount of later rewards, per token.")] = 1.0
    lam: Annotated[float, Field(ge=0, le=1, description="Lambda of generalised advantage estimation.")] = 0.95
    whiten_rewards: Annotated[
        bool, Field(description="Divide rewards of tokens by their standard deviation within a window.")
    ] = False
    whiten_advantages: Annotated[
        bool, Field(description="Give the advantages of a window a mean of 0 and a variance of 1.")
    ] = True

    cliprange: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="How far a token's ratio to the old policy counts.")
    ] = 0.2
    cliprange_value: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="How far the value of a state counts as moved.")
    ] = 0.2
    vf_coef: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Weight of the loss of the values beside the policy's.")
    ] = 0.1

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ConfigError("option 'kl_target': adapts kl_coef, which is 0 and stays so; give it a value above 0")
        if self.reference_model is not None and self.kl_coef == 0:
            raise ConfigError(
                "option 'reference_model': kl_coef is 0, so nothing is compared with it; leave one of them out"
            )

    @hookimpl
    def sftx_rollout(self, run: RunInfo) -> Rollout:
        from sftx_plugins.reinforcement.advantages import KLController
        from sftx_plugins.reinforcement.ppo_rollout import PPORollout

        return PPORollout(
            num_answers=self.num_generations,
            max_new_tokens=self.response_length,
            sampling={"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p},
            temperature=self.temperature,
            reward_weights=self.reward_weights,
            missing_eos_penalty=self.missing_eos_penalty or 0.0,
            steps_per_rollout=self.steps_per_rollout,
            num_iterations=self.num_ppo_epochs,
            controller=KLController(self.kl_coef, self.kl_target, self.kl_horizon),
            kl_estimator=self.kl_estimator,
            reference_model=self.reference_model or str(run.config["model"]),
            is_reference_given=self.reference_model is not None,
            gamma=self.gamma,
            lam=self.lam,
            whiten_rewards=self.whiten_rewards,
            whiten_advantages=self.whiten_advantages,
        )

    @hookimpl
    def sftx_loss(self) -> Loss:
        from sftx_plugins.reinforcement.ppo_loss import PPOLoss

        return PPOLoss(self.cliprange, self.cliprange_value, self.vf_coef, self.temperature)
