"""The parameters that train become the optimizers of a run, with their groups and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sftx.checkpoint import optimizer_state
from sftx.config.options import TrainConfig
from sftx.errors import ModelError
from sftx.model.language_model import CausalLM
from sftx.trainer.optimizer_factories import build
from sftx.trainer.parameter_groups import trained


class RunOptimizer:
    """What updates the parameters: one optimizer of torch's interface or several, each with its own parameters.

    Norms and biases do not decay; `rate_scale` of an adapter and `embedding_learning_rate` scale the rate of a group.
    """

    def __init__(self, lm: CausalLM, config: TrainConfig) -> None:
        self._kind = config.optim
        members = trained(lm, config)
        self._parameters = {member.name: member.parameter for member in members}
        self.optimizers: list[Optimizer] = build(config, members)

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the coming step, before each group's own scale."""
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
        """Tensors by `<name of the parameter>/<name in the optimizer's state>`, and the rest as JSON values.

        The tensors are the optimizer's own where they can be: write them before the next step.
        """
        tensors, values = optimizer_state.gather(self.optimizers, self._parameters)
        return tensors, {"optim": self._kind, **values}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes copies of what `state_dict` gave, bit for bit; other keys of `values` are left alone.

        Raises ModelError when it is of another optimizer or of other parameters.
        """
        if values.get("optim") != self._kind:
            raise ModelError(
                f"the saved state is that of the optimizer {values.get('optim')}, this run has {self._kind}; "
                "resume with the options of the run that saved it"
            )
        optimizer_state.restore(self.optimizers, self._parameters, tensors, values)
