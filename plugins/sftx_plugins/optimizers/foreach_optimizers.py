"""SGD and Lion with decoupled weight decay, which torch has not, computed for all parameters of a group at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _ForeachOptimizer(Optimizer):
    """An optimizer that updates all parameters of a group at once with torch._foreach functions."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Takes no closure: the loss is computed already."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            self.update(group, parameters, [p.grad for p in parameters])

    def update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def get_state(self, parameters: list[Tensor], entry: str) -> list[Tensor]:
        """Return this entry of the state of each parameter, which starts as zeros like the parameter."""
        for p in parameters:
            if entry not in self.state[p]:
                self.state[p][entry] = torch.zeros_like(p)
        return [self.state[p][entry] for p in parameters]


class SGD(_ForeachOptimizer):
    """Stochastic gradient descent with momentum: b <- momentum * b + g; p <- p - lr * b."""

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    def update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if group["momentum"]:
            buffers = self.get_state(parameters, "momentum_buffer")
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            grads = buffers
        torch._foreach_add_(parameters, grads, alpha=-group["lr"])


class Lion(_ForeachOptimizer):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2).

    p <- p - lr * sign(beta1 * m + (1 - beta1) * g); then m <- beta2 * m + (1 - beta2) * g.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        averages = self.get_state(parameters, "exp_avg")
        directions = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(directions, grads, alpha=1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])
        torch._foreach_mul_(averages, beta2)
        torch._foreach_add_(averages, grads, alpha=1 - beta2)
