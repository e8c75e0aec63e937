"""Optimizers that torch has not, or has with another weight decay. All are torch.optim.Optimizer's by interface.

In the formulas p is a parameter, g its gradient, lr the rate of its group; weight decay is decoupled everywhere:
p <- p (1 - lr * weight_decay) before the update (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Foreach(Optimizer):
    """Goes through the groups; a rule updates the parameters of a group that have gradients, all at once."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update. A closure, which torch's own take, is not taken: the engine has the loss already."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            self.update(group, parameters, [p.grad for p in parameters])

    def update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def running(self, parameters: list[Tensor], entry: str) -> list[Tensor]:
        """The entry of each parameter's state, which begins as zeros of its shape, dtype and device."""
        for p in parameters:
            if entry not in self.state[p]:
                self.state[p][entry] = torch.zeros_like(p)
        return [self.state[p][entry] for p in parameters]


class SGD(_Foreach):
    """Stochastic gradient descent with momentum: b <- momentum * b + g; p <- p - lr * b."""

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    def update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        if group["momentum"]:
            buffers = self.running(parameters, "momentum_buffer")
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            grads = buffers
        torch._foreach_add_(parameters, grads, alpha=-group["lr"])


class Lion(_Foreach):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2).

    p <- p - lr * sign(beta1 * m + (1 - beta1) * g); then m <- beta2 * m + (1 - beta2) * g.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        averages = self.running(parameters, "exp_avg")
        directions = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(directions, grads, alpha=1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_add_(parameters, directions, alpha=-group["lr"])
        torch._foreach_mul_(averages, beta2)
        torch._foreach_add_(averages, grads, alpha=1 - beta2)


class SplitAdamW(Optimizer):
    """AdamW for weights in bfloat16, whose updates are not lost: the other 16 bits of each fp32 weight are state.

    The model computes with the fp32 weight rounded to bfloat16; weight and `low_bits` (int16, fp32 bits less those of
    the rounded weight) together are the fp32 weight, so nothing of what full-size masters would hold is lost, and
    Kahan's compensation, which holds 8 of the 16 bits, is not needed. 12 bytes a parameter with its gradient instead
    of 16: weight, low bits, first moment and gradient in 2 each, the second moment in fp32. In bfloat16, whose steps
    are 2^-8 apart, a beta2 of 0.999 could never decay it: after gradients that fell to a fifth it stood 12 times too
    high, 3000 steps later.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update, parameter by parameter: all at once would need the memory that is to be saved."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, self.state[parameter])

    def _update(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        """Kingma & Ba 2015 (https://arxiv.org/abs/1412.6980, algorithm 1) in fp32, with decoupled weight decay."""
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["low_bits"] = torch.zeros_like(parameter, dtype=torch.int16)
        state["step"] += 1
        (beta1, beta2), rate = group["betas"], group["lr"]
        grad, second = parameter.grad.float(), state["exp_avg_sq"]  # type: ignore[union-attr]
        first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        state["exp_avg"].copy_(first)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = second.div(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
        weight = _joined(parameter, state["low_bits"]).mul_(1 - rate * group["weight_decay"])
        weight.addcdiv_(first, scale, value=-rate / (1 - beta1 ** state["step"]))
        _split(weight, parameter, state["low_bits"])


def _joined(high: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 numbers of bfloat16 ones and the bits that these lack."""
    return ((high.view(torch.int16).int() << 16) + low_bits).view(torch.float32)


def _split(number: Tensor, high: Tensor, low_bits: Tensor) -> None:
    """Writes fp32 numbers as the nearest bfloat16 ones, ties away from zero so that the rest fits 16 bits, and rest."""
    bits = number.view(torch.int32)
    rounded = (bits + 0x8000) >> 16
    high.view(torch.int16).copy_(rounded)
    low_bits.copy_(bits - (rounded << 16))
