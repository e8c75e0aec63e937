"""The parameters that train become the optimizers of a run, with their groups and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sftx.config import TrainConfig
from sftx.errors import ModelError
from sftx.model.language_model import LanguageModel


class RunOptimizer:
    """What updates the parameters: one optimizer of torch's interface or several, each with its own parameters.

    Norms and biases do not decay; `rate_scale` of an adapter and `embedding_learning_rate` scale the rate of a group.
    """

    def __init__(self, lm: LanguageModel, config: TrainConfig) -> None:
        self._named = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        if not self._named:
            raise ModelError("nothing is left to train: no parameter of the model requires a gradient")
        trained = list(self._named.values())
        # Norm weights and biases are the vectors of a transformer, everything else is a matrix.
        decayed = [parameter for parameter in trained if parameter.ndim >= 2]
        others = [parameter for parameter in trained if parameter.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizers: list[Optimizer] = [
            AdamW(
                [group for group in groups if group["params"]],
                lr=config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
            )
        ]

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the coming step, before each group's own scale."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by `<name of the parameter>/<name in the optimizer's state>`, and the rest as JSON values."""
        tensors: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for name, parameter in self._named.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{key}"] = value
        return tensors, {}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, bit for bit. Raises ModelError when it is of other parameters."""
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            parameter = self._named.get(name)
            if parameter is None:
                raise ModelError(f"the optimizer's state has {name}, which does not train in this run")
            self.optimizers[0].state[parameter][entry] = (
                value.clone() if entry == "step" else value.to(parameter.device)
            )
