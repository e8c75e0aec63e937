"""The numbers that PPO computes of a window of answers on the host, in fp64: rewards of tokens, advantages, whitening.

Each answer has arrays [A], one value for each of its A tokens, in the order in which they were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

_EPSILON = 1e-8
"""What whitening adds to a variance, as TRL does."""


def estimated_kl(log_probs_A: Values, reference_A: Values, estimator: Literal["k1", "k3"]) -> Values:
    """Return an estimate of the KL divergence from the reference for each sampled token, in nats.

    k1 is log(p / q), of which the mean over samples of p is the divergence; k3 is q / p - 1 - log(q / p), whose mean is
    the same, with less variance and never below 0 (Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    log_ratio_A = reference_A - log_probs_A
    return -log_ratio_A if estimator == "k1" else np.expm1(log_ratio_A) - log_ratio_A


def token_rewards(kl_A: Values, kl_coef: float, score: float) -> Values:
    """Return the reward of each token: the penalty on its divergence, and at the last one the answer's score too."""
    rewards_A = -kl_coef * kl_A
    rewards_A[-1] += score
    return rewards_A


def advantages(rewards_A: Values, values_A: Values, *, gamma: float, lam: float) -> Values:
    """Return the generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438, equation 16).

    `values_A` are those of the states before each token; the state after the last token has the value 0. The returns,
    to which values are fitted, are the advantages plus the values.
    """
    advantages_A = np.zeros_like(rewards_A)
    following, next_value = 0.0, 0.0
    for t in reversed(range(len(rewards_A))):
        delta = rewards_A[t] + gamma * next_value - values_A[t]
        following = advantages_A[t] = delta + gamma * lam * following
        next_value = values_A[t]
    return advantages_A


def whiten(values: Sequence[Values], *, shift_mean: bool = True) -> list[Values]:
    """Return the values of all answers with a variance of 1 over all tokens, and with a mean of 0 if `shift_mean`.

    The variance is unbiased. A single value stays as it is: it has none.
    """
    every = np.concatenate([*values, np.zeros(0)])
    if len(every) < 2:
        return list(values)
    mean, scale = every.mean(), 1 / np.sqrt(every.var(ddof=1) + _EPSILON)
    kept = 0.0 if shift_mean else mean
    return [(one_A - mean) * scale + kept for one_A in values]


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or moved towards a target (Ziegler et al. 2019, arXiv:1909.08593, 2.2).

    The adaptive one multiplies the coefficient by 1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon.
    """

    coefficient: float
    target: float | None = None
    """KL divergence of an answer, in nats, that is aimed at; None leaves the coefficient as it is."""
    horizon: int = 10000
    """Answers over which an error of 1 would change the coefficient by its own size."""

    def update(self, kl: float, num_answers: int) -> None:
        """Adapt the coefficient to the mean divergence of so many answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * num_answers / self.horizon
