"""The learning rate of every step is that of transformers' schedulers, or of the formula a schedule is named for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from optimizing import learning_rates, schedule_stage
from sftx.config.options import TrainConfig
from sftx.trainer.schedule import num_warmup_steps

PEAK, NUM_STEPS = 3e-3, 30

ORACLES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"lr_scheduler_type": "constant"}, "constant_with_warmup", {}),
    ({"lr_scheduler_type": "linear"}, "linear", {}),
    ({"lr_scheduler_type": "cosine"}, "cosine", {}),
    ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ({"lr_scheduler_type": "linear", "min_lr_ratio": 0.2}, "polynomial", {"lr_end": PEAK * 0.2, "power": 1.0}),
    ({"lr_scheduler_type": "polynomial", "lr_power": 2.5}, "polynomial", {"lr_end": 0.0, "power": 2.5}),
    (
        {"lr_scheduler_type": "polynomial", "lr_power": 0.5, "min_lr_ratio": 0.05},
        "polynomial",
        {"lr_end": PEAK * 0.05, "power": 0.5},
    ),
    *(
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_decay_steps": 12,
                "lr_decay_type": decay,
                "min_lr_ratio": floor,
            },
            "warmup_stable_decay",
            {"num_decay_steps": 12, "decay_type": decay, "min_lr_ratio": floor},
        )
        for decay in ("linear", "cosine", "1-sqrt")
        for floor in (0.0, 0.1)
    ),
]


@pytest.mark.parametrize(("options", "name", "arguments"), ORACLES, ids=lambda value: str(value))
@pytest.mark.parametrize("warmup", [0, 7, 40])
def test_rates_are_those_of_transformers(
    options: dict[str, Any], name: str, arguments: dict[str, Any], warmup: int
) -> None:
    import torch
    from transformers import get_scheduler

    config = TrainConfig(learning_rate=PEAK, warmup_steps=warmup, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=NUM_STEPS,
        scheduler_specific_kwargs=arguments,
    )
    for rate in learning_rates(config, NUM_STEPS, range(NUM_STEPS + 1)):
        expected = scheduler.get_last_lr()[0]
        # A rate that is 0 is so but for the rounding of its last multiplication.
        assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15 * PEAK)
        optimizer.step()
        scheduler.step()


def test_minimind_is_the_formula_of_its_trainers() -> None:
    config = TrainConfig(learning_rate=PEAK, lr_scheduler_type="minimind")
    for step, rate in enumerate(learning_rates(config, NUM_STEPS)):
        formula = PEAK / 10 + 0.5 * PEAK * (1 + math.cos(math.pi * step / NUM_STEPS))
        assert rate == pytest.approx(formula, rel=1e-12)


def test_minimind_warms_up_to_where_its_formula_begins() -> None:
    config = TrainConfig(learning_rate=PEAK, lr_scheduler_type="minimind", warmup_steps=10)
    rates = learning_rates(config, NUM_STEPS)
    assert rates[:11] == pytest.approx([1.1 * PEAK * step / 10 for step in range(11)])
    after = [PEAK / 10 + 0.5 * PEAK * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates[10:] == pytest.approx(after, rel=1e-12)


@pytest.mark.parametrize("options", [options for options, _, _ in ORACLES] + [{"lr_scheduler_type": "minimind"}])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_rates_of_short_runs_are_between_floor_and_peak(options: dict[str, Any], num_steps: int) -> None:
    """Warm-up and decay that are longer than the run, and steps past its end."""
    config = TrainConfig(learning_rate=PEAK, warmup_steps=3, **options)
    rates = learning_rates(config, num_steps, range(num_steps + 3))
    assert all(0 <= rate <= 1.1 * PEAK for rate in rates)
    falling = rates[num_warmup_steps(config, num_steps) :]
    assert falling == sorted(falling, reverse=True)


def test_warmup_below_one_is_a_share_of_all_steps() -> None:
    assert num_warmup_steps(TrainConfig(warmup_steps=0.1), 30) == 3
    assert num_warmup_steps(TrainConfig(warmup_steps=0.1), 31) == 4
    assert num_warmup_steps(TrainConfig(warmup_steps=5), 31) == 5


def test_decay_below_one_is_a_share_of_all_steps_and_leaves_warmup_alone() -> None:
    def steps(num_steps: int, decay: float, warmup: float = 0.0) -> int:
        config = TrainConfig(lr_scheduler_type="warmup_stable_decay", lr_decay_steps=decay, warmup_steps=warmup)
        schedule: Any = schedule_stage(config, num_steps)
        num_decay: int = schedule._schedule.num_decay
        return num_decay

    assert steps(30, 0.1) == 3
    assert steps(31, 0.1) == 4
    assert steps(30, 25, warmup=10) == 20
    assert steps(30, 25, warmup=40) == 0
