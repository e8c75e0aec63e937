"""The loss of PPO (Schulman et al. 2017, arXiv:1707.06347): clipped losses of policy and values, and the value head.

Dimensions: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from sftx import IGNORE_INDEX, Batch, DataError, LanguageModel, LossSum, per_label

LOG_PROBS: Final = "ppo_log_probs"
ADVANTAGES: Final = "ppo_advantages"
VALUES: Final = "ppo_values"
RETURNS: Final = "ppo_returns"
TOKEN_NUMBERS: Final = (LOG_PROBS, ADVANTAGES, VALUES, RETURNS)
"""The keys of an example's extras, each a list of one number for each token; what stands at the prompt is not used."""


class Clipped(NamedTuple):
    """For each token, the larger one of a loss and its clipped form, and whether that is the clipped one."""

    loss_BT: Tensor
    is_clipped_BT: Tensor


def policy_loss(log_ratio_BT: Tensor, advantages_BT: Tensor, cliprange: float) -> Clipped:
    """Return -min(r A, clip(r, 1 - cliprange, 1 + cliprange) A), where r = exp(log_ratio): equation 7, negated."""
    ratio_BT = log_ratio_BT.exp()
    free_BT = -advantages_BT * ratio_BT
    bound_BT = -advantages_BT * ratio_BT.clamp(1 - cliprange, 1 + cliprange)
    return Clipped(torch.maximum(free_BT, bound_BT), bound_BT > free_BT)


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, cliprange_value: float) -> Clipped:
    """Return half the larger of two squared errors: of the value, and of it kept within `cliprange_value` of the old.

    It is that of OpenAI's code (baselines/ppo2); the paper has none.
    """
    free_BT = (values_BT - returns_BT).square()
    near_BT = torch.clamp(values_BT, old_values_BT - cliprange_value, old_values_BT + cliprange_value)
    bound_BT = (near_BT - returns_BT).square()
    return Clipped(0.5 * torch.maximum(free_BT, bound_BT), bound_BT > free_BT)


class ValueHead(nn.Module):
    """A linear function of the last hidden states, computed in fp32; it begins at 0 everywhere."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return the value of the state at each position: [B, T], in the dtype of the head."""
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            return nn.functional.linear(hidden_BTD.to(self.weight.dtype), self.weight, self.bias).squeeze(-1)


def values_of(lm: LanguageModel, hidden_BTD: Tensor) -> Tensor:
    """Return the value of the state at each position, from which its label is drawn: [B, T]."""
    assert lm.loss_module is not None
    values_BT: Tensor = lm.loss_module(hidden_BTD)
    return values_BT


def log_probs(lm: LanguageModel, batch: Batch, hidden_BTD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each label, and the entropy at its position: [B, T], 0 where nothing is trained."""
    out = lm.cross_entropy(
        hidden_BTD,
        batch.labels_BT,
        num_valid=batch.num_label_tokens,
        reduction="none",
        stats=True,
        temperature=temperature,
    )
    assert out.entropy_N is not None
    return -out.loss.view_as(batch.labels_BT), out.entropy_N.view_as(batch.labels_BT)


@dataclass(frozen=True)
class PPOLoss:
    """Adds up the clipped losses of policy and values over the tokens of answers, and is divided by their number."""

    cliprange: float
    cliprange_value: float
    vf_coef: float
    temperature: float
    answers_only = True

    def module(self, lm: LanguageModel) -> nn.Module:
        """Return the value head."""
        return ValueHead(lm.head_weight.shape[1])

    def extras(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the rollout computed of each token, [B, T], laid out as the labels are. Raises DataError."""
        for example in batch.examples:
            if missing := [name for name in TOKEN_NUMBERS if name not in example.extras]:
                raise DataError(
                    f"{example.row_id}: has no {missing[0]}, which the rollout of ppo gives its answers; the loss of "
                    "ppo trains on nothing else, so leave --no-plugin ppo and other rollouts out"
                )
        return {name: per_label(batch, [one.extras[name] for one in batch.examples]) for name in TOKEN_NUMBERS}

    def denominator(self, batch: Batch) -> float:
        return float(batch.num_label_tokens)

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        given = batch.extras
        is_label_BT = batch.labels_BT != IGNORE_INDEX
        hidden = lm.hidden(batch)
        log_probs_BT, entropy_BT = log_probs(lm, batch, hidden.hidden_BTD, self.temperature)
        log_ratio_BT = log_probs_BT - given[LOG_PROBS]
        policy = policy_loss(log_ratio_BT, given[ADVANTAGES], self.cliprange)
        values_BT = values_of(lm, hidden.hidden_BTD)
        values = value_loss(values_BT, given[VALUES], given[RETURNS], self.cliprange_value)

        def total(numbers_BT: Tensor) -> Tensor:
            """Add up over the tokens of answers."""
            return torch.where(is_label_BT, numbers_BT, 0).sum()

        weights_BT = 1.0 if batch.token_weights_BT is None else batch.token_weights_BT
        policy_sum, value_sum = total(weights_BT * policy.loss_BT), total(weights_BT * values.loss_BT)
        moved_BT = log_ratio_BT.detach()
        metrics = {
            "loss/policy_avg": policy_sum.detach(),
            "loss/value_avg": value_sum.detach(),
            "policy/approxkl_avg": total(0.5 * moved_BT.square()),
            "policy/clipfrac_avg": total(policy.is_clipped_BT.to(moved_BT)),
            "entropy": total(entropy_BT),
            "val/clipfrac_avg": total(values.is_clipped_BT.to(moved_BT)),
            "val/ratio": total(moved_BT.exp()),
        }
        return LossSum(policy_sum + self.vf_coef * value_sum, hidden.aux_loss, metrics)
