"""Makes the optimizers that `train.optim` names, and defines those that torch has not or has without decoupled decay.

In the formulas p is a parameter, g its gradient, lr the learning rate of its group. Weight decay is decoupled
everywhere: p <- p (1 - lr * weight_decay) before the update (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from sftx.config.optimizer_table import OPTIMIZERS, names_where
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError, one_line
from sftx.trainer.parameter_groups import TrainableParam, groups


def make_optimizers(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    """Return the optimizers of a run, each with its own parameters.

    Raises ConfigError for what this machine, these parameters or these options do not allow.
    """
    spec = OPTIMIZERS[config.optim]
    if config.momentum is not None and not spec.has_momentum:
        raise ConfigError(
            f"option 'train.momentum': {spec.name} has none; leave it out, or use {names_where('has_momentum')}"
        )
    if spec.needs_gpu and params[0].parameter.device.type != "cuda":
        without_paging = spec.name.removeprefix("paged_")
        raise ConfigError(f"option 'train.optim': {spec.name} needs a GPU, whose memory it pages; use {without_paging}")
    module, _, function = spec.factory.partition(":")
    optimizers: list[Optimizer] = getattr(importlib.import_module(module), function)(config, params)
    return optimizers


def _adam_options(config: TrainConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": _betas(config, default_beta2=0.999), "eps": config.adam_epsilon}


def _betas(config: TrainConfig, *, default_beta2: float) -> tuple[float, float]:
    return config.adam_beta1, default_beta2 if config.adam_beta2 is None else config.adam_beta2


def make_adamw(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    # Fused on a CPU too: an update of SmolLM2-135M took 0.2 s on one core, and 1.0 s with foreach or a plain loop.
    return [AdamW(groups(params, config.weight_decay), **_adam_options(config), fused=True)]


def make_bitsandbytes_adamw(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    """Make AdamW of bitsandbytes, with 8-bit state, paged state or both.

    The state of the embedding stays in 32 bits, as the authors advise: few of its rows get a gradient in a step.
    """
    try:
        library = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ConfigError(
            f"option 'train.optim': {config.optim} is from bitsandbytes, which cannot be imported "
            f"({one_line(error)}); pip install bitsandbytes, or use adamw"
        ) from error
    class_name = "PagedAdamW" if config.optim.startswith("paged") else "AdamW"
    has_8bit_state = config.optim.endswith("8bit")
    in_8_bits = [param for param in params if has_8bit_state and not param.is_embedding]
    in_32_bits = [param for param in params if not (has_8bit_state and not param.is_embedding)]
    return [
        getattr(library, name)(groups(chosen, config.weight_decay), **_adam_options(config))
        for name, chosen in ((f"{class_name}8bit", in_8_bits), (class_name, in_32_bits))
        if chosen
    ]


def make_adafactor(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    """Make Adafactor as transformers' Trainer does: the schedule sets the rate, an update's RMS is at most 1, and there
    is no first moment.

    torch's Adafactor always multiplies the rate by the RMS of the parameter itself: LoRA's B, which starts as zero,
    would move by a thousandth of the rate, and rates that suit AdamW would train nothing.
    """
    from transformers.optimization import Adafactor

    options = {"scale_parameter": False, "relative_step": False}
    return [Adafactor(groups(params, config.weight_decay), lr=config.learning_rate, **options)]


def make_lion(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    betas = _betas(config, default_beta2=0.99)  # the default of its authors
    return [Lion(groups(params, config.weight_decay), lr=config.learning_rate, betas=betas)]


def make_sgd(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    return [SGD(groups(params, config.weight_decay), lr=config.learning_rate, momentum=config.momentum or 0.0)]


def make_muon(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    """Make Muon for the matrices of the layers, and AdamW for embedding, head, vectors and stacked experts.

    Muon's update is scaled to the RMS of AdamW's, so that AdamW's learning rates and weight decay suit both. (Jordan
    2024, https://kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, https://arxiv.org/abs/2502.16982,
    section 2.2.)
    """
    hidden = [p for p in params if p.parameter.ndim == 2 and not (p.is_embedding or p.is_head)]
    if not hidden:
        raise ConfigError("option 'train.optim': muon trains the layers' matrices, and none trains here; use adamw")
    muon = Muon(
        groups(hidden, config.weight_decay),
        lr=config.learning_rate,
        momentum=0.95 if config.momentum is None else config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    hidden_names = {param.name for param in hidden}
    others = [param for param in params if param.name not in hidden_names]
    return [muon, *(make_adamw(config, others) if others else [])]


def make_split_adamw(config: TrainConfig, params: Sequence[TrainableParam]) -> list[Optimizer]:
    wrong = next((param for param in params if param.parameter.dtype != torch.bfloat16), None)
    if wrong is not None:
        raise ConfigError(
            f"option 'train.optim': {config.optim} is for full fine-tuning with bf16, whose weights it keeps in "
            f"bfloat16; {wrong.name} trains in {str(wrong.parameter.dtype).removeprefix('torch.')}; use adamw"
        )
    return [SplitAdamW(groups(params, config.weight_decay), **_adam_options(config))]


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
        weight = _join(parameter, state["low_bits"]).mul_(1 - rate * group["weight_decay"])
        weight.addcdiv_(first, scale, value=-rate / (1 - beta1 ** state["step"]))
        _split(weight, parameter, state["low_bits"])


def _join(high: Tensor, low_bits: Tensor) -> Tensor:
    """Return the fp32 numbers of bfloat16 numbers and the bits that these lack."""
    return ((high.view(torch.int16).int() << 16) + low_bits).view(torch.float32)


def _split(number: Tensor, high: Tensor, low_bits: Tensor) -> None:
    """Write fp32 numbers as the nearest bfloat16 numbers, and the remaining bits.

    Ties are rounded away from zero, so that the remainder fits 16 bits.
    """
    bits = number.view(torch.int32)
    rounded = (bits + 0x8000) >> 16
    high.view(torch.int16).copy_(rounded)
    low_bits.copy_(bits - (rounded << 16))
