"""What a plugin author imports, and nothing else.

Importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

from sftx.assembly.hookspecs import hookimpl
from sftx.data.collate import pack, pad
from sftx.errors import ConfigError, DataError, ModelError, OutputError, PluginError, SftxError, TrainingError
from sftx.events import EvalReport, Provider, RunInfo, Sample, StartReport, StepReport, TokenLosses
from sftx.types import (
    IGNORE_INDEX,
    Adapter,
    Attention,
    Batch,
    Collator,
    Conversation,
    Example,
    HiddenOut,
    Location,
    Loss,
    LossSum,
    Message,
    Metric,
    ModelSpec,
    Observer,
    Parsed,
    Parser,
    PlainText,
    Record,
    Row,
    Segment,
    Step,
    Template,
    Tokens,
    ToolCall,
)

if TYPE_CHECKING:
    from sftx.model.language_model import LanguageModel

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `sftx.LanguageModel`, which needs torch, on first use."""
    if name == "LanguageModel":
        from sftx.model.language_model import LanguageModel

        return LanguageModel
    raise AttributeError(f"module 'sftx' has no attribute {name!r}")


__all__ = [
    "IGNORE_INDEX",
    "Adapter",
    "Attention",
    "Batch",
    "Collator",
    "ConfigError",
    "Conversation",
    "DataError",
    "EvalReport",
    "Example",
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
    "OutputError",
    "Parsed",
    "Parser",
    "PlainText",
    "PluginError",
    "Provider",
    "Record",
    "Row",
    "RunInfo",
    "Sample",
    "Segment",
    "SftxError",
    "StartReport",
    "Step",
    "StepReport",
    "Template",
    "TokenLosses",
    "Tokens",
    "ToolCall",
    "TrainingError",
    "hookimpl",
    "pack",
    "pad",
]
