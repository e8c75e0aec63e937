"""PPO's rollout and loss against transformers' own logits and plain formulas, token by token.

The model is the tiny one with LoRA moved away from the base, and a value head that is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sftx import Answer, Batch, ConfigError, DataError, Example, Rollouts, RunInfo, pack, pad
from sftx.model.language_model import CausalLM
from sftx.testing.kit import Kit, built_in, make_stage
from sftx_plugins.reinforcement.ppo import PPO
from sftx_plugins.reinforcement.ppo_loss import ADVANTAGES, LOG_PROBS, RETURNS, VALUES, PPOLoss

TEMPERATURE = 0.8
OPTIONS: dict[str, Any] = {
    "response_length": 7,
    "num_generations": 2,
    "temperature": TEMPERATURE,
    "kl_coef": 0.3,
    "gamma": 0.95,
    "lam": 0.9,
    "missing_eos_penalty": 0.5,
}


def moved(lm: CausalLM, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def kit_of(plugin: PPO) -> Kit:
    kit = Kit(plugin)
    lm = kit.language_model({"lora": make_stage(built_in("lora", r=4), "sftx_adapter", spec=kit.spec)})
    lm.loss_module = kit.loss.module(lm)  # type: ignore[attr-defined]
    moved(lm, 0, 0.3)
    kit.__dict__["policy_model"] = lm.eval()
    # Answers of the tiny model hardly ever end by themselves: a token that it likes ends some of them.
    kit.encoder.__dict__["stop_ids"] = tuple(range(0, 640, 9))
    return kit


def rollouts(kit: Kit) -> Rollouts:
    with torch.no_grad():
        return kit.rollout(kit.policy(), kit.held_out_rows, 1)


@dataclass
class Plain:
    """What transformers and plain formulas give for one answer, a number for each of its tokens."""

    log_probs: list[float]
    reference: list[float]
    values: list[float]
    score: float

    def kl(self, estimator: str) -> list[float]:
        ratios = [q - p for p, q in zip(self.log_probs, self.reference, strict=True)]
        return [-x if estimator == "k1" else math.exp(x) - 1 - x for x in ratios]


def own_log_probs(lm: CausalLM, ids: Sequence[int], length: int) -> list[float]:
    logits_TV = lm.model(input_ids=torch.tensor([list(ids)])).logits[0].double() / TEMPERATURE
    all_TV = logits_TV.log_softmax(-1)
    return [float(all_TV[t - 1, ids[t]]) for t in range(len(ids) - length, len(ids))]


@torch.no_grad()
def plain(lm: CausalLM, answer: Answer) -> Plain:
    ids, length = [*answer.question.prompt_ids, *answer.token_ids], len(answer.token_ids)
    hidden_TD = lm.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    head: Any = lm.loss_module
    values_T = (hidden_TD @ head.weight[0].double() + head.bias[0].double())[-length - 1 : -1]
    with lm.without_adapters():
        reference = own_log_probs(lm, ids, length)
    penalty = 0.0 if answer.finish_reason == "stop" else 0.5
    return Plain(own_log_probs(lm, ids, length), reference, values_T.tolist(), answer.reward - penalty)


def numbers(example: Example, name: str, length: int) -> list[float]:
    assert len(example.extras[name]) == len(example.token_ids)
    assert set(example.extras[name][:-length]) == {0.0}
    given: list[float] = example.extras[name][-length:]
    return given


@pytest.mark.parametrize(
    "options", [{}, {"kl_estimator": "k3"}, {"whiten_rewards": True}, {"whiten_advantages": False}], ids=str
)
def test_a_window_has_the_numbers_of_plain_formulas(options: dict[str, Any]) -> None:
    plugin = PPO(**{**OPTIONS, **options})
    kit = kit_of(plugin)
    made, lm = rollouts(kit), kit.policy_model
    assert {answer.finish_reason for answer in made.answers} == {"stop", "length"}
    expected = [plain(lm, answer) for answer in made.answers]
    rewards: list[list[float]] = []
    for one in expected:
        of_tokens = [-0.3 * kl for kl in one.kl(plugin.kl_estimator)]
        rewards.append([*of_tokens[:-1], of_tokens[-1] + one.score])
    if plugin.whiten_rewards:
        every = np.concatenate(rewards)
        rewards = [[(r - every.mean()) / every.std(ddof=1) + every.mean() for r in row] for row in rewards]
    estimates = []
    for row, one in zip(rewards, expected, strict=True):
        following = [*one.values[1:], 0.0]
        errors = [r + 0.95 * n - v for r, n, v in zip(row, following, one.values, strict=True)]
        last = len(row)
        estimates.append([sum((0.95 * 0.9) ** (s - t) * errors[s] for s in range(t, last)) for t in range(last)])
    every = np.concatenate(estimates)
    for example, answer, one, row in zip(made.examples, made.answers, expected, estimates, strict=True):
        length = len(answer.token_ids)
        assert numbers(example, LOG_PROBS, length) == pytest.approx(one.log_probs, abs=1e-5)
        assert numbers(example, VALUES, length) == pytest.approx(one.values, abs=1e-5)
        returns = [estimate + value for estimate, value in zip(row, one.values, strict=True)]
        assert numbers(example, RETURNS, length) == pytest.approx(returns, abs=1e-5)
        if plugin.whiten_advantages:
            row = [(estimate - every.mean()) / every.std(ddof=1) for estimate in row]
        assert numbers(example, ADVANTAGES, length) == pytest.approx(row, abs=1e-5)
    divergence = np.mean([sum(one.kl(plugin.kl_estimator)) for one in expected])
    score = np.mean([one.score for one in expected])
    assert abs(divergence) > 0.01
    assert made.metrics["objective/kl"] == pytest.approx(divergence, abs=1e-5)
    assert made.metrics["objective/scores"] == pytest.approx(score, abs=1e-9)
    assert made.metrics["objective/rlhf_reward"] == pytest.approx(score - 0.3 * divergence, abs=1e-5)
    assert made.metrics["val/num_eos_tokens"] == sum(answer.finish_reason == "stop" for answer in made.answers)


def batch_of(examples: Sequence[Example], loss: PPOLoss, layout: str) -> Batch:
    batch = (pad if layout == "padded" else pack)(list(examples))
    return replace(batch, extras=loss.extras(batch))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_and_gradient_are_those_of_plain_formulas(layout: str) -> None:
    kit = kit_of(PPO(**OPTIONS))
    examples, lm, loss = rollouts(kit).examples, kit.policy_model, kit.loss
    moved(lm, 1, 0.05)  # steps later: ratios are not 1, and some are clipped
    assert isinstance(loss, PPOLoss)
    batch = batch_of(examples, loss, layout)
    out = loss(lm, batch)
    out.sum.backward()
    gradients = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    assert {name.partition(".")[0] for name in gradients} == {"model", "loss_module"}
    lm.zero_grad()

    policy_sum, value_sum, num_clipped, num_tokens = torch.zeros(()), torch.zeros(()), 0, 0
    head: Any = lm.loss_module
    for example in examples:
        ids_T = torch.tensor(example.token_ids[None].astype(np.int64))
        hidden_TD = lm.model.model(input_ids=ids_T).last_hidden_state[0]
        log_probs_TV = (lm.model.lm_head(hidden_TD) / TEMPERATURE).log_softmax(-1)
        values_T = head(hidden_TD[None])[0]
        for t in np.flatnonzero(example.loss_mask).tolist():
            old = {name: example.extras[name][t] for name in (LOG_PROBS, VALUES, ADVANTAGES, RETURNS)}
            ratio = (log_probs_TV[t - 1, ids_T[0, t]] - old[LOG_PROBS]).exp()
            advantage = old[ADVANTAGES]
            policy_sum = policy_sum - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            value = values_T[t - 1]
            near = value.clamp(old[VALUES] - 0.2, old[VALUES] + 0.2)
            value_sum = value_sum + 0.5 * torch.maximum((value - old[RETURNS]) ** 2, (near - old[RETURNS]) ** 2)
            num_clipped += int(ratio.clamp(0.8, 1.2) * advantage < ratio * advantage)
            num_tokens += 1
    expected = policy_sum + 0.1 * value_sum
    expected.backward()
    assert loss.denominator(batch) == num_tokens
    assert out.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float(out.metrics["loss/policy_avg"]) == pytest.approx(policy_sum.item(), rel=1e-5, abs=1e-5)  # type: ignore[arg-type]
    assert float(out.metrics["loss/value_avg"]) == pytest.approx(value_sum.item(), rel=1e-5)  # type: ignore[arg-type]
    assert float(out.metrics["policy/clipfrac_avg"]) == num_clipped > 0  # type: ignore[arg-type]
    for name, gradient in gradients.items():
        other: Tensor = lm.get_parameter(name).grad  # type: ignore[assignment]
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_before_a_step_every_ratio_is_1() -> None:
    kit = kit_of(PPO(**OPTIONS))
    examples, loss = rollouts(kit).examples, kit.loss
    assert isinstance(loss, PPOLoss)
    out = loss(kit.policy_model, batch_of(examples, loss, "padded"))
    assert float(out.metrics["policy/clipfrac_avg"]) == 0  # type: ignore[arg-type]
    assert float(out.metrics["policy/approxkl_avg"]) < 1e-8  # type: ignore[arg-type]


def test_the_coefficient_follows_the_divergence_and_is_part_of_the_state() -> None:
    kit = kit_of(PPO(**OPTIONS, kl_target=0.001, kl_horizon=100))
    first = rollouts(kit)
    rollout: Any = kit.rollout
    state = rollout.state_dict()
    assert state["kl_coef"] == pytest.approx(0.3 * (1 + 0.2 * len(first.answers) / 100))
    assert first.metrics["objective/kl_coef"] == 0.3
    second = rollouts(kit)
    assert second.metrics["objective/kl_coef"] == state["kl_coef"]
    rollout.load_state_dict(state)
    assert rollouts(kit).examples == second.examples


def test_without_a_penalty_there_is_no_reference() -> None:
    kit = kit_of(PPO(**{**OPTIONS, "kl_coef": 0.0}))
    assert rollouts(kit).metrics["objective/kl"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_target": 6.0, "kl_coef": 0.0}, "option 'kl_target': adapts kl_coef, which is 0"),
        ({"reference_model": "x", "kl_coef": 0.0}, "option 'reference_model': kl_coef is 0"),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        PPO(**options).sftx_validate(RunInfo(tmp_path, {}))


def test_an_ordinary_example_is_refused() -> None:
    batch = pad([Example([5, 6, 7], [False, True, True], "chat.jsonl:3", 3)])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^chat.jsonl:3: has no ppo_log_probs"):
        PPOLoss(0.2, 0.2, 0.1, 1.0).extras(batch)
