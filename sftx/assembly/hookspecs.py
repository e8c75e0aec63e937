"""The hooks of a run. A plugin is a frozen dataclass whose `@hookimpl` methods implement one or more of them.

Each hook is called once, when a run is assembled, in the order in which the plugins were named; none is called during
training. It must return an object of the annotated type, never None. An implementation takes only the parameters that
it needs; `run` has the run's options, those of all its plugins among them.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Final

import pluggy

from sftx.events import RunInfo
from sftx.types import (
    Adapter,
    Collator,
    Control,
    Evaluator,
    Exporter,
    Loss,
    Metric,
    ModelSpec,
    Observer,
    OptimizerBuilder,
    Parser,
    Reward,
    Rollout,
    RowSource,
    Schedule,
    Template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROJECT: Final = "sftx"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a method of a plugin as the implementation of the hook of that name."""


@hookspec
def sftx_validate(run: RunInfo) -> None:
    """Raise ConfigError for a combination of options that cannot be right. Any number; called before torch is imported.

    It comes beside hooks that return a stage: a plugin that only validates would take part in nothing.
    """


@hookspec
def sftx_source(run: RunInfo) -> RowSource:  # type: ignore[empty-body]
    """Return a source of rows, which reads the addresses of its scheme. Any number, of different schemes."""


@hookspec
def sftx_parser(run: RunInfo) -> Parser:  # type: ignore[empty-body]
    """Return a parser of one record format. Any number; the first that accepts a record parses it, or `data.format`."""


@hookspec
def sftx_template(tokenizer: PreTrainedTokenizerBase, run: RunInfo) -> Template:  # type: ignore[empty-body]
    """Return the template that renders conversations as text. Exactly one, if a parser yields conversations."""


@hookspec
def sftx_collator(max_length: int, run: RunInfo) -> Collator:  # type: ignore[empty-body]
    """Return the collator, which plans steps and makes batches from examples of up to `max_length` tokens. One."""


@hookspec
def sftx_adapter(spec: ModelSpec, run: RunInfo) -> Adapter:  # type: ignore[empty-body]
    """Return an adapter for a frozen model; called before weights are read. Any number; none is full fine-tuning."""


@hookspec
def sftx_trainable(spec: ModelSpec, run: RunInfo) -> Set[str]:  # type: ignore[empty-body]
    """Return the names of the model's own parameters that train. At most one; without it and adapters, all of them.

    The others are frozen, and the result is a full model. The names are some of `spec.parameter_names`; either name of
    two tied weights stands for both.
    """


@hookspec
def sftx_loss(run: RunInfo) -> Loss:  # type: ignore[empty-body]
    """Return the loss to minimise. At most one."""


@hookspec
def sftx_rollout(run: RunInfo) -> Rollout:  # type: ignore[empty-body]
    """Return a rollout, which makes examples from answers of the model while it trains. At most one.

    The rows of such a run are questions, and the loss is one for the rollout's examples: a plugin implements both.
    """


@hookspec
def sftx_reward(run: RunInfo) -> Reward:  # type: ignore[empty-body]
    """Return a reward, which scores answers of the model for a rollout. Any number."""


@hookspec
def sftx_optimizer(run: RunInfo) -> OptimizerBuilder:  # type: ignore[empty-body]
    """Return what makes the optimizer of the trainable parameters. One; `train.optim` names the plugin."""


@hookspec
def sftx_schedule(num_warmup_steps: int, num_training_steps: int, run: RunInfo) -> Schedule:  # type: ignore[empty-body]
    """Return the learning-rate schedule of a run of so many optimizer steps. One; `train.lr_scheduler_type` names it.

    `num_training_steps` are all steps of the run, of which the first `num_warmup_steps` warm up.
    """


@hookspec
def sftx_metric(run: RunInfo) -> Metric:  # type: ignore[empty-body]
    """Return a metric that compares a generated answer with the reference. Any number."""


@hookspec
def sftx_evaluator(run: RunInfo) -> Evaluator:  # type: ignore[empty-body]
    """Return an evaluator, which scores the model at each evaluation. Any number."""


@hookspec
def sftx_control(run: RunInfo) -> Control:  # type: ignore[empty-body]
    """Return a control, which may evaluate, save, stop or change the learning rate after a step. Any number."""


@hookspec
def sftx_observer(run: RunInfo) -> Observer:  # type: ignore[empty-body]
    """Return an observer of the run's events. Any number."""


@hookspec
def sftx_exporter(run: RunInfo) -> Exporter:  # type: ignore[empty-body]
    """Return an exporter of results, which `sftx export` calls; a training run does not. Any number."""


VALIDATE: Final = "sftx_validate"
"""The hook that returns nothing."""

RETURNS: Final[dict[str, type]] = {
    "sftx_source": RowSource,
    "sftx_parser": Parser,
    "sftx_template": Template,
    "sftx_collator": Collator,
    "sftx_adapter": Adapter,
    "sftx_trainable": Set,
    "sftx_loss": Loss,
    "sftx_rollout": Rollout,
    "sftx_reward": Reward,
    "sftx_optimizer": OptimizerBuilder,
    "sftx_schedule": Schedule,
    "sftx_metric": Metric,
    "sftx_evaluator": Evaluator,
    "sftx_control": Control,
    "sftx_observer": Observer,
    "sftx_exporter": Exporter,
}
"""The hooks that return a stage, in the order of the stages of a run, and the type that each must return."""

ONE_PROVIDER: Final = frozenset(
    {
        "sftx_template",
        "sftx_collator",
        "sftx_trainable",
        "sftx_loss",
        "sftx_rollout",
        "sftx_optimizer",
        "sftx_schedule",
    }
)
"""The hooks that at most one plugin of a run may implement."""
