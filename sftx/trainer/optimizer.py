"""The optimizer of a run: one torch.optim.Optimizer or several, with learning rates and state as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sftx.checkpoint import optimizer_state
from sftx.config.options import TrainConfig
from sftx.errors import ModelError
from sftx.model.language_model import CausalLM
from sftx.trainer.optimizers import make_optimizers
from sftx.trainer.parameter_groups import trainable_params


class RunOptimizer:
    """Updates the trainable parameters with one or several torch optimizers; each has its own parameters.

    Norms and biases do not decay; `rate_scale` of an adapter and `embedding_learning_rate` scale the rate of a group.
    """

    def __init__(self, lm: CausalLM, config: TrainConfig) -> None:
        self._name = config.optim
        params = trainable_params(lm, config)
        self._parameters = {param.name: param.parameter for param in params}
        self.optimizers: list[Optimizer] = make_optimizers(config, params)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step, which each group multiplies by its own scale."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by `<name of the parameter>/<name in the optimizer's state>`, and the rest as JSON values.

        The tensors are not copied if possible: write them before the next step.
        """
        tensors, values = optimizer_state.gather(self.optimizers, self._parameters)
        return tensors, {"optim": self._name, **values}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit; other keys of `values` are ignored.

        Raises ModelError when it is the state of another optimizer or of other parameters.
        """
        if values.get("optim") != self._name:
            raise ModelError(
                f"the saved state is that of the optimizer {values.get('optim')}, this run has {self._name}; "
                "resume with the options of the run that saved it"
            )
        optimizer_state.restore(self.optimizers, self._parameters, tensors, values)
