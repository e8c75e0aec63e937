"""Optimizer and schedule as stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sftx.assembly.stages.stage import Stage, is_number
from sftx.types import OptimizerBuilder, Schedule, TrainableParam

if TYPE_CHECKING:
    from torch.optim import Optimizer


class OptimizerStage(Stage):
    """Builds the optimizers of a run, and checks that they train every parameter and that their state can be saved."""

    def __init__(self, plugin: str, builder: OptimizerBuilder, name: str) -> None:
        """`name`: the plugin's own name, as `train.optim` has it."""
        super().__init__(plugin)
        self.name = name
        self._builder = builder
        with self._attribute("reading what it declares"):
            self.state_bytes: Any = builder.state_bytes
            self.elementwise: Any = builder.elementwise
            self.bf16_weights: Any = getattr(builder, "bf16_weights", False)
            self.needs_gpu: Any = getattr(builder, "needs_gpu", False)
        if not (is_number(self.state_bytes) and 0 <= self.state_bytes < math.inf):
            raise self._refuse(f"state_bytes is {self.state_bytes!r:.40}, expected a number of at least 0")
        for what in ("elementwise", "bf16_weights", "needs_gpu"):
            if not isinstance(declared := getattr(self, what), bool):
                raise self._refuse(f"{what} is {declared!r:.40}, expected True or False")

    def build(self, params: Sequence[TrainableParam]) -> list[Optimizer]:
        """Build the optimizers. Raises PluginError unless each parameter is in exactly one group, with its rate."""
        from torch.optim import Optimizer

        with self._attribute("build"):
            made: Any = self._builder.build(params)
        if not isinstance(made, list | tuple) or not made or not all(isinstance(one, Optimizer) for one in made):
            what = f"{made!r:.60}" if isinstance(made, list | tuple) else type(made).__name__
            raise self._refuse(f"build returned {what}, expected a list of torch optimizers")
        names = {id(param.parameter): param.name for param in params}
        found: set[int] = set()
        for group in (group for optimizer in made for group in optimizer.param_groups):
            for entry in ("lr", "scale"):
                value = group.get(entry)
                if not (is_number(value) and 0 <= value < math.inf):
                    raise self._refuse(
                        f"build made a parameter group whose {entry} is {value!r:.40}, expected a number; "
                        "sftx.parameter_groups makes groups with their scale"
                    )
            for parameter in group["params"]:
                if id(parameter) not in names:
                    shape = list(getattr(parameter, "shape", ()))
                    raise self._refuse(f"build has a parameter of shape {shape} that is none of those it was given")
                if id(parameter) in found:
                    raise self._refuse(
                        f"build has {names[id(parameter)]} in two optimizers, which would update it twice"
                    )
                found.add(id(parameter))
        if missing := [name for key, name in names.items() if key not in found]:
            raise self._refuse(
                f"build leaves out {len(missing)} of {len(names)} parameters, which would not be trained (first: "
                f"{missing[0]})"
            )
        return list(made)

    def step(self, optimizer: Optimizer) -> None:
        with self._attribute("step"):
            optimizer.step()

    def check_state(
        self, optimizers: Sequence[Optimizer], params: Sequence[TrainableParam], options: Sequence[Mapping[str, Any]]
    ) -> None:
        """Raise PluginError for state that a checkpoint would lose. `options` are those of the groups before a step."""
        from torch import Tensor

        names = {id(param.parameter): param.name for param in params}
        for state in (optimizer.state for optimizer in optimizers):
            for parameter, entries in state.items():
                if id(parameter) not in names or not isinstance(entries, Mapping):
                    raise self._refuse(f"its state has {parameter!r:.40}, expected the state of parameters alone")
                for entry, value in entries.items():
                    if not (isinstance(value, Tensor) or (is_number(value) and math.isfinite(value))):
                        raise self._refuse(
                            f"its state of {names[id(parameter)]} has {value!r:.40} as {entry!r:.40}, expected tensors "
                            "and finite numbers, which a checkpoint can hold"
                        )
        for before, after in zip(options, group_options(optimizers), strict=True):
            for name in before.keys() | after.keys():
                if before.get(name) != after.get(name):
                    raise self._refuse(
                        f"a step changed {name!r} of a parameter group, which no checkpoint has; keep it in "
                        "state[parameter]"
                    )


def group_options(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Return the plain values of each parameter group: all but the parameters and what is set before each step."""
    return [
        {name: value for name, value in group.items() if isinstance(value, str | int | float | tuple | None)}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


class ScheduleStage(Stage):
    """Gives the factors of the learning rate, and checks that they are finite numbers of at least 0."""

    def __init__(self, plugin: str, schedule: Schedule) -> None:
        super().__init__(plugin)
        self._schedule = schedule
        with self._attribute("warmup_start"):
            self.warmup_start: Any = getattr(schedule, "warmup_start", 0.0)
        if not (is_number(self.warmup_start) and 0 <= self.warmup_start <= 1):
            raise self._refuse(f"warmup_start is {self.warmup_start!r:.40}, expected a number from 0 to 1")

    def factor(self, step: int, num_steps: int) -> float:
        with self._attribute("factor"):
            factor: Any = self._schedule.factor(step, num_steps)
        if not (is_number(factor) and 0 <= factor < math.inf):
            raise self._refuse(f"factor({step}, {num_steps}) is {factor!r:.40}, expected a finite number of at least 0")
        return float(factor)
