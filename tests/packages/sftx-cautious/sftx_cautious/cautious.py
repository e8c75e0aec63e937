"""The optimizer itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class Cautious(Optimizer):
    """AdamW (Loshchilov & Hutter 2017) whose update u of the gradient g is u * (u g > 0) / mean(u g > 0)."""

    def __init__(
        self, params: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, least: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "least": least})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                scale = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                update = state["exp_avg"] / (1 - beta1 ** state["step"]) / scale
                mask = (update * p.grad > 0).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update * mask / mask.mean().clamp_min(group["least"]), alpha=-group["lr"])
