"""The formulas of PPO against plain ones in fp64, written from the papers without a recursion or a running sum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sftx_plugins.reinforcement.advantages import KLController, advantages, estimated_kl, token_rewards, whiten
from sftx_plugins.reinforcement.ppo_loss import policy_loss, value_loss

LENGTHS = (1, 2, 7, 40)


def drawn(length: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float64]:
    return scale * np.random.default_rng(seed).standard_normal(length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_are_the_discounted_sums_of_the_errors_of_the_values(length: int, gamma: float, lam: float) -> None:
    rewards, values = drawn(length, 1), drawn(length, 2)
    following = [*values[1:], 0.0]
    errors = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    expected = [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, length)) for t in range(length)]
    assert advantages(rewards, values, gamma=gamma, lam=lam) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_with_lambda_1_the_returns_are_the_discounted_rewards(gamma: float) -> None:
    rewards, values = drawn(9, 1), drawn(9, 2)
    expected = [sum(gamma ** (s - t) * rewards[s] for s in range(t, 9)) for t in range(9)]
    assert advantages(rewards, values, gamma=gamma, lam=1.0) + values == pytest.approx(expected, rel=1e-12)


def test_the_score_is_at_the_last_token_and_the_penalty_at_each() -> None:
    kl = np.array([0.5, -0.25, 1.0])
    assert token_rewards(kl, 0.1, 2.0).tolist() == pytest.approx([-0.05, 0.025, 1.9])
    assert kl.tolist() == [0.5, -0.25, 1.0], "what is given stays as it is"


def test_both_estimators_have_the_divergence_as_their_mean() -> None:
    """Exactly, by the probabilities of a small vocabulary."""
    p, q = (torch.tensor(drawn(6, seed)).softmax(0).numpy() for seed in (1, 2))
    divergence = float((p * np.log(p / q)).sum())
    assert divergence > 0.1
    for estimator in ("k1", "k3"):
        estimates = estimated_kl(np.log(p), np.log(q), estimator)  # type: ignore[arg-type]
        assert float((p * estimates).sum()) == pytest.approx(divergence, rel=1e-12)
    assert (estimated_kl(np.log(p), np.log(q), "k3") >= 0).all()
    assert (estimated_kl(np.log(p), np.log(q), "k1") < 0).any()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_over_all_tokens_of_all_answers(shift_mean: bool) -> None:
    values = [3 + drawn(length, length, scale=5) for length in LENGTHS]
    whitened = whiten(values, shift_mean=shift_mean)
    assert [len(one) for one in whitened] == list(LENGTHS)
    before, after = torch.tensor(np.concatenate(values)), torch.tensor(np.concatenate(whitened))
    mean, variance = before.mean(), before.var(unbiased=True)
    expected = (before - mean) / (variance + 1e-8).sqrt() + (0 if shift_mean else mean)
    assert after.tolist() == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-12)
    assert after.var().item() == pytest.approx(1)


def test_a_single_token_and_none_have_no_variance() -> None:
    assert [one.tolist() for one in whiten([np.array([2.5])])] == [[2.5]]
    assert whiten([]) == []


def test_a_fixed_coefficient_stays() -> None:
    controller = KLController(0.05)
    controller.update(100.0, 64)
    assert controller.coefficient == 0.05


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)])
def test_an_adaptive_coefficient_follows_equation_2_of_ziegler(kl: float, error: float) -> None:
    controller = KLController(0.2, target=6.0, horizon=10000)
    controller.update(kl, 256)
    assert controller.coefficient == pytest.approx(0.2 * (1 + error * 256 / 10000), rel=1e-12)


def numbers(seed: int) -> dict[str, torch.Tensor]:
    names = ("log_ratio", "advantage", "value", "old_value", "return")
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.4 * torch.randn(200, generator=generator, dtype=torch.float64) for name in names}


def test_the_policy_loss_and_its_gradient_are_those_of_the_paper() -> None:
    given = numbers(0)
    log_ratio, eps = given["log_ratio"].requires_grad_(), 0.2
    loss = policy_loss(log_ratio, given["advantage"], eps)
    expected, clipped, slopes = [], [], []
    for x, advantage in zip(log_ratio.tolist(), given["advantage"].tolist(), strict=True):
        ratio = math.exp(x)
        bound = min(max(ratio, 1 - eps), 1 + eps)
        expected.append(-min(ratio * advantage, bound * advantage))
        is_clipped = bound * advantage < ratio * advantage
        clipped.append(is_clipped)
        slopes.append(0.0 if is_clipped else -advantage * ratio)
    assert loss.loss_BT.tolist() == pytest.approx(expected, rel=1e-12)
    assert loss.is_clipped_BT.tolist() == clipped
    assert 20 < sum(clipped) < 180
    loss.loss_BT.sum().backward()
    gradient: Any = log_ratio.grad
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-15)


def test_the_value_loss_and_its_gradient_are_those_of_a_clipped_value() -> None:
    given = numbers(1)
    value, eps = given["value"].requires_grad_(), 0.2
    loss = value_loss(value, given["old_value"], given["return"], eps)
    expected, clipped, slopes = [], [], []
    for new, old, wanted in zip(value.tolist(), given["old_value"].tolist(), given["return"].tolist(), strict=True):
        near = min(max(new, old - eps), old + eps)
        free, bound = (new - wanted) ** 2, (near - wanted) ** 2
        expected.append(0.5 * max(free, bound))
        clipped.append(bound > free)
        slopes.append(0.0 if bound > free else new - wanted)
    assert loss.loss_BT.tolist() == pytest.approx(expected, rel=1e-12)
    assert loss.is_clipped_BT.tolist() == clipped
    assert 20 < sum(clipped) < 180
    loss.loss_BT.sum().backward()
    gradient: Any = value.grad
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-15)
