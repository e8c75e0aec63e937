"""AdamW whose fp32 weights are kept as a bfloat16 number and the bits that it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw


class SplitAdamW(Optimizer):
    """AdamW for weights in bfloat16 that loses no update: the other 16 bits of each fp32 weight are optimizer state.

    The model computes with the fp32 weight rounded to bfloat16; the weight and `low_bits` (int16, the fp32 bits minus
    those of the rounded weight) together are the fp32 weight, so nothing of what fp32 master weights hold is lost, and
    Kahan's compensation, which holds 8 of the 16 bits, is not needed. It needs 12 bytes a parameter with its gradient
    instead of 16: weight, low bits, first moment and gradient in 2 each, the second moment in fp32. In bfloat16, whose
    steps are 2^-8 apart, a beta2 of 0.999 could never decay it: after gradients that fell to a fifth it was 12 times
    too high, 3000 steps later.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update one parameter after the other: all at once would need the memory that this optimizer saves."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, self.state[parameter])

    def _update(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> None:
        """Let torch's fused AdamW, which passes over memory once, update the fp32 weight and moments."""
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["low_bits"] = torch.zeros_like(parameter, dtype=torch.int16)
        assert parameter.grad is not None
        weight, first = _join(parameter, state["low_bits"]), state["exp_avg"].float()
        done = torch.full((), state["step"], dtype=torch.float32, device=parameter.device)
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [parameter.grad.float()], [first], [state["exp_avg_sq"]], [], [done],
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        state["step"] += 1
        state["exp_avg"].copy_(first)
        _split(weight, parameter, state["low_bits"])


def _join(high: Tensor, low_bits: Tensor) -> Tensor:
    """Return the fp32 numbers of bfloat16 numbers and the bits that these lack."""
    return torch.add(low_bits, high.view(torch.int16).int(), alpha=1 << 16).view(torch.float32)


def _split(number: Tensor, high: Tensor, low_bits: Tensor) -> None:
    """Write fp32 numbers as the nearest bfloat16 numbers, and the remaining bits.

    Ties are rounded away from zero, so that the remainder fits 16 bits.
    """
    bits = number.view(torch.int32)
    rounded = (bits + 0x8000).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(rounded)
    low_bits.copy_(torch.sub(bits, rounded, alpha=1 << 16))
