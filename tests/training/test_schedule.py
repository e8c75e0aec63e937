"""The learning rate of every step is that of transformers' schedulers."""

from __future__ import annotations

import pytest

from sftx.config import TrainConfig
from sftx.training.schedule import learning_rate, num_warmup_steps


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_are_those_of_transformers(kind: str, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    num_steps = 30
    config = TrainConfig(learning_rate=3e-3, lr_scheduler_type=kind, warmup_steps=warmup)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    for step in range(num_steps):
        assert learning_rate(config, step, num_steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_warmup_below_one_is_a_share_of_all_steps() -> None:
    assert num_warmup_steps(TrainConfig(warmup_steps=0.1), 30) == 3
    assert num_warmup_steps(TrainConfig(warmup_steps=0.1), 31) == 4
    assert num_warmup_steps(TrainConfig(warmup_steps=5), 31) == 5
