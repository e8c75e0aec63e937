"""Optimizers and schedules of options, made by their plugins as a run makes them."""

from __future__ import annotations

from sftx.assembly.registry import Assembly, activate
from sftx.assembly.stages.optimizer_stages import OptimizerStage, ScheduleStage
from sftx.config.loading import LoadedConfig
from sftx.config.options import RunConfig, TrainConfig
from sftx.config.run_file import Origins
from sftx.model.language_model import CausalLM
from sftx.trainer import schedule
from sftx.trainer.optimizer import RunOptimizer
from sftx.trainer.parameter_groups import trainable_params


def assembled(config: TrainConfig) -> Assembly:
    return activate(LoadedConfig(RunConfig(train=config), Origins()))


def optimizer_stage(config: TrainConfig) -> OptimizerStage:
    return assembled(config).optimizer()


def schedule_stage(config: TrainConfig, num_steps: int) -> ScheduleStage:
    return assembled(config).schedule(schedule.num_warmup_steps(config, num_steps), num_steps)


def run_optimizer(lm: CausalLM, config: TrainConfig) -> RunOptimizer:
    """Return the optimizer that `train.optim` names, of the model's trainable parameters."""
    return RunOptimizer(trainable_params(lm, config), optimizer_stage(config))


def learning_rates(config: TrainConfig, num_steps: int, steps: range | None = None) -> list[float]:
    """Return the learning rate of each step, by default of all of the run."""
    stage = schedule_stage(config, num_steps)
    return [schedule.learning_rate(stage, config, step, num_steps) for step in steps or range(num_steps)]
