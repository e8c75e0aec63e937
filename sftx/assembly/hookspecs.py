"""The hook points. A plugin is a frozen dataclass whose `@hookimpl` methods fill one or more of them.

Hooks are called once, when a run is assembled, in the order in which the plugins were named; never in the hot loop.
Each must return what its annotation says: a plugin that has nothing to give does not implement the hook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pluggy

from sftx.events import RunInfo
from sftx.types import Adapter, Collator, Loss, Metric, ModelSpec, Observer, Parser, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROJECT: Final = "sftx"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sftx_parser() -> Parser:  # type: ignore[empty-body]
    """A format of records. Any number; a record goes to the first that accepts it, or to `data.format`."""


@hookspec
def sftx_template(tokenizer: PreTrainedTokenizerBase) -> Template:  # type: ignore[empty-body]
    """The text form of a conversation. Exactly one, when any parser yields conversations."""


@hookspec
def sftx_collator(max_length: int) -> Collator:  # type: ignore[empty-body]
    """What shares a step and a batch, given the longest example that the run allows. At most one."""


@hookspec
def sftx_adapter(spec: ModelSpec) -> Adapter:  # type: ignore[empty-body]
    """What trains on a frozen base, called before weights are read. Any number; none is full fine-tuning."""


@hookspec
def sftx_loss() -> Loss:  # type: ignore[empty-body]
    """What is minimised. At most one."""


@hookspec
def sftx_metric() -> Metric:  # type: ignore[empty-body]
    """A score of a generated answer against the right one. Any number."""


@hookspec
def sftx_observer(run: RunInfo) -> Observer:  # type: ignore[empty-body]
    """Somebody to be told of the run's events. Any number."""


RETURNS: Final[dict[str, type]] = {
    "sftx_parser": Parser,
    "sftx_template": Template,
    "sftx_collator": Collator,
    "sftx_adapter": Adapter,
    "sftx_loss": Loss,
    "sftx_metric": Metric,
    "sftx_observer": Observer,
}
"""Each hook, in the order of the stages of a run, and what an implementation must return."""

ONE_PROVIDER: Final = frozenset({"sftx_template", "sftx_collator", "sftx_loss"})
"""Hooks that at most one plugin may fill."""
