"""The optimizer of a run: one torch.optim.Optimizer or several, with learning rates and state as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sftx.assembly.stages.optimizer_stages import OptimizerStage, group_options
from sftx.checkpoint import optimizer_state
from sftx.errors import ModelError, PluginError
from sftx.types import TrainableParam


class RunOptimizer:
    """Updates the trainable parameters with one or several torch optimizers; each has its own parameters."""

    def __init__(self, params: Sequence[TrainableParam], builder: OptimizerStage) -> None:
        self._builder = builder
        self._params = params
        self._parameters = {param.name: param.parameter for param in params}
        self._is_checked = False
        self.optimizers = builder.build(params)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step, which each group multiplies by its own scale."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the parameters. The first time, raise PluginError when a checkpoint would lose a part of the state."""
        before = [] if self._is_checked else group_options(self.optimizers)
        for optimizer in self.optimizers:
            self._builder.step(optimizer)
        if not self._is_checked:
            try:
                self._builder.check_state(self.optimizers, self._params, before)
            except PluginError as error:
                error.is_shared = True  # every rank has the same state
                raise
            self._is_checked = True

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors by `<name of the parameter>/<name in the optimizer's state>`, and the rest as JSON values.

        The tensors are not copied if possible: write them before the next step.
        """
        tensors, values = optimizer_state.gather(self.optimizers, self._parameters)
        return tensors, {"optim": self._builder.name, **values}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit; other keys of `values` are ignored.

        Raises ModelError when it is the state of another optimizer or of other parameters.
        """
        if values.get("optim") != self._builder.name:
            raise ModelError(
                f"the saved state is that of the optimizer {values.get('optim')}, this run has {self._builder.name}; "
                "resume with the options of the run that saved it"
            )
        optimizer_state.restore(self.optimizers, self._parameters, tensors, values)
