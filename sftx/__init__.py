"""The public names: `run`, `resume`, `inspect`, `plan` and `load_run` for scripts and notebooks, others for plugins.

Importing this package imports neither torch nor transformers; the five functions are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftx.assembly.hookspecs import hookimpl
from sftx.data.collate import pack, pad, per_label, sum_by_example
from sftx.errors import ConfigError, DataError, ModelError, OutputError, PluginError, SftxError, TrainingError
from sftx.events import Decision, EvalReport, Provider, RunInfo, Sample, StartReport, StepReport, TokenLosses
from sftx.secret import Secret
from sftx.trainer.parameter_groups import parameter_groups
from sftx.types import (
    IGNORE_INDEX,
    Adapter,
    Answer,
    Attention,
    Batch,
    Collator,
    Control,
    Conversation,
    Evaluation,
    Evaluator,
    Example,
    ExportedModel,
    Exporter,
    ExportSource,
    HiddenOut,
    LanguageModel,
    Location,
    Loss,
    LossSum,
    Message,
    Metric,
    ModelSpec,
    Observer,
    OptimizerBuilder,
    Parsed,
    Parser,
    PlainText,
    Policy,
    Question,
    Record,
    Reward,
    Rollout,
    Rollouts,
    Rounding,
    Row,
    RowSource,
    Schedule,
    Segment,
    SharedPrefixes,
    Step,
    Template,
    Tokens,
    ToolCall,
    TrainableParam,
    Window,
)

if TYPE_CHECKING:
    from sftx.api import inspect, plan, resume, run
    from sftx.checkpoint.load_run import load_run
    from sftx.trainer.frozen_model import load_model

__version__ = "0.2.0"

__all__ = [
    "IGNORE_INDEX",
    "Adapter",
    "Answer",
    "Attention",
    "Batch",
    "Collator",
    "ConfigError",
    "Control",
    "Conversation",
    "DataError",
    "Decision",
    "EvalReport",
    "Evaluation",
    "Evaluator",
    "Example",
    "ExportSource",
    "ExportedModel",
    "Exporter",
    "HiddenOut",
    "LanguageModel",
    "Location",
    "Loss",
    "LossSum",
    "Message",
    "Metric",
    "ModelError",
    "ModelSpec",
    "Observer",
    "OptimizerBuilder",
    "OutputError",
    "Parsed",
    "Parser",
    "PlainText",
    "PluginError",
    "Policy",
    "Provider",
    "Question",
    "Record",
    "Reward",
    "Rollout",
    "Rollouts",
    "Rounding",
    "Row",
    "RowSource",
    "RunInfo",
    "Sample",
    "Schedule",
    "Secret",
    "Segment",
    "SftxError",
    "SharedPrefixes",
    "StartReport",
    "Step",
    "StepReport",
    "Template",
    "TokenLosses",
    "Tokens",
    "ToolCall",
    "TrainableParam",
    "TrainingError",
    "Window",
    "hookimpl",
    "inspect",
    "load_model",
    "load_run",
    "pack",
    "pad",
    "parameter_groups",
    "per_label",
    "plan",
    "resume",
    "run",
    "sum_by_example",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("inspect", "plan", "resume", "run"):
        return getattr(import_module("sftx.api"), name)
    if name == "load_model":
        return import_module("sftx.trainer.frozen_model").load_model
    if name == "load_run":
        return import_module("sftx.checkpoint.load_run").load_run
    raise AttributeError(f"module 'sftx' has no attribute {name!r}")
