"""Stages: what plugins made, each wrapped once in a class that names the plugin in errors and checks what it returns.

A wrapper refuses results that would train or evaluate wrongly without a sign, where the plugin's name is known; nothing
after it checks them again. Importing this module imports no torch.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast, get_args

from sftx.assembly.hookspecs import RETURNS
from sftx.config.default_plugins import RESERVED_SCHEMES, SCHEME
from sftx.distributed.process_group import is_lost_peer_error
from sftx.errors import DataError, PluginError, SftxError, counted, did_you_mean, is_out_of_memory, one_line
from sftx.events import Decision, EvalReport, StepReport
from sftx.types import (
    LEDGER_KEYS,
    Adapter,
    Answer,
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
    Step,
    Template,
    Tokens,
    ToolCall,
    TrainableParam,
    Window,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

RESERVED_METRICS: Final = frozenset(
    {"event", "aux_loss", "loss_scale", "perplexity", "tokens_per_second"}
    | {field.name for report in (StepReport, EvalReport) for field in fields(report)}
)
"""Names of what the trainer reports itself: neither a loss nor a metric may report a value under one of them."""

_OWN_COUNT: Final = " (count)"
"""What follows a metric's name where its own count is added up."""
_LARGEST_NLL: Final = 700.0  # the largest one whose exponential is a finite number

# --- from a hook to a stage ---------------------------------------------------------------------


def arguments_of(function: Callable[..., object]) -> list[str]:
    """Return the names of the parameters; none for a function in C that does not say them."""
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:
        return []


def call(plugin: object, hook: str, **arguments: Any) -> Any:
    """Call the plugin's `hook` with those of `arguments` that it asks for, and return what it returns."""
    implementation = getattr(plugin, hook)
    return implementation(**{name: arguments[name] for name in arguments_of(implementation)})


def make(plugin: object, hook: str, **arguments: Any) -> Any:
    """Call the plugin's `hook` with those of `arguments` that it asks for. Raises PluginError for a wrong result."""
    made = call(plugin, hook, **arguments)
    kind = RETURNS[hook]
    missing: list[str] = []
    if kind in (Adapter, Control, Observer, Set):
        is_right = isinstance(made, kind)
    else:  # not isinstance for a protocol: from Python 3.12 on it does not see what __getattr__ delegates
        promised = sorted(name for name in vars(kind) if not name.startswith("_") or name == "__call__")
        missing = [name for name in promised if not hasattr(made, name)]
        is_right = not missing
    if not is_right:
        article = "an" if kind.__name__[0] in "AO" else "a"
        named_ones = [name for name in missing if name != "__call__"]
        lacks = f", which has also {', '.join(named_ones)}" if named_ones else ""
        lacks = "; is its `return` missing?" if made is None else lacks
        raise PluginError(f"{hook} returned {type(made).__name__}, expected {article} {kind.__name__}{lacks}")
    for base, prefix in ((Observer, "on_"), (Control, "after_")):
        for name in dir(made) if isinstance(made, base) else ():
            if name.startswith(prefix) and not hasattr(base, name):  # no run would ever call it
                hint = did_you_mean(name, [event for event in vars(base) if event.startswith(prefix)])
                raise PluginError(f"{type(made).__name__}.{name} is no event of this sftx's {hook[5:]}s{hint}")
    return made


@contextmanager
def named(who: str, what: str) -> Iterator[None]:
    """Put a plugin's name in front of the errors of its code, which need not know its own name and version.

    sys.exit in a plugin becomes an error too: the process must not end as if all were well.
    """
    try:
        yield
    except SftxError as error:
        if who not in str(error):
            error.args = (f"{who}: {error}",)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(f"{who}: {what} failed: {type(error).__name__}: {one_line(error)}") from error


class _Stage:
    """The plugin's own object, and the name under which its errors are reported."""

    def __init__(self, plugin: str) -> None:
        self._plugin = plugin

    def __str__(self) -> str:
        return self._plugin

    @contextmanager
    def _attribute(self, what: str) -> Iterator[None]:
        """Name the plugin in errors, except those of the machine, which the trainer explains by itself."""
        try:
            yield
        except BaseException as error:
            if is_out_of_memory(error) or is_lost_peer_error(error) or self._explains_itself(error, what):
                raise
            with named(self._plugin, what):
                raise

    def _explains_itself(self, error: BaseException, what: str) -> bool:
        """Return whether the error needs no plugin's name: a row of data is at fault, or a full disk."""
        return False

    def _refuse(self, message: str) -> PluginError:
        return PluginError(f"{self._plugin}: {message}")


# --- data ---------------------------------------------------------------------------------------


class RowSourceStage(_Stage):
    """Reads rows of a scheme, and checks their places and values."""

    def __init__(self, plugin: str, source: RowSource) -> None:
        super().__init__(plugin)
        self._source = source
        self._unknown: set[str] = set()
        with self._attribute("scheme"):
            scheme: Any = source.scheme
        if not (isinstance(scheme, str) and re.fullmatch(SCHEME, scheme)):
            raise self._refuse(f"scheme is {scheme!r:.40}, expected two or more lower-case letters, such as 'mail'")
        if scheme in RESERVED_SCHEMES:
            raise self._refuse(f"scheme is {scheme!r}, which is kept for sftx itself; choose another")
        self.scheme: str = scheme

    def check(self, address: str) -> None:
        with self._attribute("check"):
            self._source.check(address)

    def rows(self, address: str, start: int) -> Iterator[tuple[Location, Record]]:
        """Yield the rows after the first `start`. Raises PluginError, which names the row, for what is no JSON."""
        last = ""
        with self._attribute("rows"):
            rows = iter(self._source.rows(address, start))
        while True:
            with self._attribute(f"reading{last}"):
                item: Any = next(rows, None)
            if item is None:
                return
            if not (isinstance(item, tuple) and len(item) == 2 and _is_location(item[0])):
                raise self._refuse(f"rows gave {item!r:.80}{last}, expected a pair of a Location and a row")
            where, record = item
            if not isinstance(record, dict):
                raise self._refuse(f"{where}: the row is of type {type(record).__name__}, expected a dict")
            if wrong := _find_no_json(record):
                raise self._refuse(f"{where}: {wrong}, which is no JSON value")
            yield where, record
            last = f" after {where}"

    def fingerprint(self, address: str) -> str | None:
        """Return what changes with the rows. None, when that cannot be known, is said once for each address."""
        with self._attribute("fingerprint"):
            value: Any = self._source.fingerprint(address)
        if value is None and address not in self._unknown:
            self._unknown.add(address)
            log.warning(
                "%s:%s: %s cannot tell whether its rows change: they are not cached, and a resumed run trusts that "
                "they are the same", self.scheme, address, self,
            )  # fmt: skip
        if not (value is None or (isinstance(value, str) and value)):
            raise self._refuse(f"fingerprint gave {value!r:.60}, expected some text, or None")
        return value

    def num_bytes(self, address: str) -> int:
        """Return the size of the data, 0 when the source does not tell it."""
        num_bytes: Any = getattr(self._source, "num_bytes", None)
        if num_bytes is None:
            return 0
        with self._attribute("num_bytes"):
            value: Any = num_bytes(address)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._refuse(f"num_bytes gave {value!r:.60}, expected a whole number of bytes")
        return value

    def _explains_itself(self, error: BaseException, what: str) -> bool:
        return isinstance(error, DataError)


def _is_location(where: Any) -> bool:
    is_one = isinstance(where, Location) and _PLACE_TYPES.fit(where)
    return is_one and abs(where.number) < 2**63 and where.unit not in LEDGER_KEYS


def _find_no_json(value: Any, name: str = "the row") -> str:
    """Return which value is none that JSON has, and where in the row it is; an empty text when all are."""
    if value is None or isinstance(value, str | bool | int):
        return ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"{name} is {value}"
    try:
        if type(value) is list:
            return next(filter(None, (_find_no_json(item, f"{name}[{n}]") for n, item in enumerate(value))), "")
        if type(value) is dict:
            if wrong := [key for key in value if not isinstance(key, str)]:
                return f"{name} has the key {wrong[0]!r:.40}"
            return next(filter(None, (_find_no_json(item, f"{name}[{key!r:.40}]") for key, item in value.items())), "")
    except RecursionError:
        return "the row is nested too deeply"
    return f"{name} is of type {type(value).__name__}"


class ParserStage(_Stage):
    """Converts records, and checks that the results have the promised types."""

    def __init__(self, plugin: str, parser: Parser) -> None:
        super().__init__(plugin)
        self._parser = parser
        with self._attribute("has_rejected"):
            self.has_rejected: Any = getattr(parser, "has_rejected", False)
        if not isinstance(self.has_rejected, bool):
            raise self._refuse(f"has_rejected is {self.has_rejected!r:.40}, expected True or False")

    @property
    def fields(self) -> str:
        with self._attribute("fields"):
            return self._parser.fields

    @property
    def samples(self) -> Sequence[Record]:
        with self._attribute("samples"):
            return self._parser.samples

    def accepts(self, record: Record) -> bool:
        with self._attribute("accepts"):
            return self._parser.accepts(record)

    def parse(self, record: Record, where: Location) -> tuple[Parsed, ...]:
        with self._attribute("parse"):
            parsed: Any = self._parser.parse(record, where)
        if not isinstance(parsed, tuple | list):
            raise self._refuse(f"parse returned {type(parsed).__name__}, expected a list")
        for item in parsed:
            if not _is_parsed(item):
                raise self._refuse(f"parse gave {item!r:.80}, expected Conversation, PlainText or Tokens of text")
            if item.extras != {}:
                with self._attribute("parse"):  # for extras that contain themselves
                    reason = _not_json(item.extras, "extras")
                if reason:
                    raise self._refuse(f"parse gave {reason}")
        return tuple(parsed)

    def _explains_itself(self, error: BaseException, what: str) -> bool:
        return isinstance(error, DataError)


class _Types:
    """Types of attributes: a plugin's author need not run a type checker."""

    def __init__(self, **types: Any) -> None:
        self._types = tuple(types.values())
        self._values = operator.attrgetter(*types)
        self._seen: set[tuple[type, ...]] = set()
        """Types that were right before: most of the million segments of a data set have the same."""

    def fit(self, thing: object) -> bool:
        """Return whether the attributes of `thing` have these types."""
        values = self._values(thing)
        kinds = tuple(map(type, values))
        if kinds not in self._seen:
            if not all(map(isinstance, values, self._types)):
                return False
            self._seen.add(kinds)
        return True


_MESSAGE_TYPES: Final = _Types(
    role=str,
    content=str,
    trainable=bool | None,
    weight=int | float,
    reasoning=str,
    tool_calls=tuple,
    name=str | None,
    tool_call_id=str | None,
)
_SEGMENT_TYPES: Final = _Types(text=str, trainable=bool, control=bool, weight=int | float, role=str)
_CALL_TYPES: Final = _Types(name=str, arguments=Mapping)
_PLACE_TYPES: Final = _Types(path=str, number=int, unit=str)


def _not_json(value: object, place: str) -> str:
    """Return which value at `place` JSON does not hold unchanged, and what to give instead; empty if there is none.

    Encoded rows are kept as JSON in the cache, from which a tuple would come back as a list, and the key 1 as "1".
    """
    found: Iterator[str] = iter(())
    if type(value) is dict:
        if odd := [key for key in value if type(key) is not str]:
            return f"{place} with the key {odd[0]!r:.60}, which JSON does not hold unchanged; use text as keys"
        found = (_not_json(own, f"{place}[{key!r}]") for key, own in value.items())
    elif type(value) is list:
        found = (_not_json(own, f"{place}[{number}]") for number, own in enumerate(value))
    elif not (value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))):
        return (
            f"{place} = {value!r:.60} ({type(value).__name__}), which JSON does not hold unchanged; use dicts, lists, "
            "text, finite numbers, True, False or None"
        )
    return next(filter(None, found), "")


def _is_parsed(item: Any) -> bool:
    match item:
        case Conversation():
            messages: Sequence[Any] = item.messages
            if not all(isinstance(message, Message) and _MESSAGE_TYPES.fit(message) for message in messages):
                return False
            calls: list[Any] = [call for message in messages for call in message.tool_calls]
            return all(isinstance(call, ToolCall) and _CALL_TYPES.fit(call) for call in calls)
        case PlainText(text=text):
            return isinstance(text, str)
        case Tokens(token_ids=ids, loss_mask=mask):
            return {*map(type, ids)} <= {int} and {*map(type, mask)} <= {bool}
    return False


class TemplateStage(_Stage):
    """Renders conversations, and checks that every segment has the promised types."""

    def __init__(self, plugin: str, template: Template) -> None:
        super().__init__(plugin)
        self._template = template
        with self._attribute("reading what it declares"):
            self.controls = template.controls
            self.stop = template.stop
            self.rewrites_history = template.rewrites_history
            self.chat_template = template.chat_template

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        with self._attribute("render"):
            segments = self._template.render(conversation)
        self._check("render", segments)
        return segments

    def generation_prompt(self, conversation: Conversation) -> tuple[Segment, ...]:
        with self._attribute("generation_prompt"):
            segments = self._template.generation_prompt(conversation)
        self._check("generation_prompt", segments)
        return segments

    def _check(self, what: str, segments: Any) -> None:
        if not isinstance(segments, tuple | list):
            raise self._refuse(f"{what} returned {type(segments).__name__}, expected a list")
        for segment in segments:
            if not (isinstance(segment, Segment) and _SEGMENT_TYPES.fit(segment)):
                raise self._refuse(f"wrote {segment!r:.90}, expected a Segment of text")
            if not 0 <= segment.weight < math.inf:
                raise self._refuse(f"a segment has the weight {segment.weight:g}, expected a number of at least 0")

    def _explains_itself(self, error: BaseException, what: str) -> bool:
        return isinstance(error, DataError)


class CollatorStage(_Stage):
    """Plans windows and collates micro-batches, and checks that no example is lost or repeated."""

    def __init__(self, plugin: str, collator: Collator) -> None:
        super().__init__(plugin)
        self._collator = collator
        with self._attribute("reading what it declares"):
            self.row_length: int | None = getattr(collator, "row_length", None)
            self.wrap_length: int | None = getattr(collator, "wrap_length", None)

    @property
    def shares_prefixes(self) -> bool:
        """Return whether it packs the examples of a group with what they begin with in common."""
        return bool(getattr(self._collator, "share_prefixes", False))

    def share_prefixes(self, shared: bool) -> bool:
        """Let the collator share prefixes from now on, or not; return False where it cannot do as asked."""
        with self._attribute("sharing"):
            sharing: Any = getattr(self._collator, "sharing", lambda shared: None)(shared)
        if sharing is None:
            return shared == self.shares_prefixes
        self._collator = sharing
        return True

    def plan(self, window: Window) -> tuple[list[Step], Row]:
        """Plan a window. Raises PluginError when an example is lost or repeated, or a step is empty or too large."""
        with self._attribute("plan"):
            planned: Any = self._collator.plan(window)
        if not isinstance(planned, tuple):
            raise self._refuse(f"plan returned {type(planned).__name__}, expected a tuple")
        try:
            given_steps, given_carried = planned
            steps = [tuple(tuple(row) for row in step) for step in given_steps]
            carried = tuple(given_carried)
            indices = sorted([*(index for step in steps for row in step for index in row), *carried])
            is_filled = all(len(row) for step in steps for row in step)
        except (TypeError, ValueError):
            raise self._refuse(f"plan gave {planned!r:.100}, expected (steps of rows of indices, row)") from None
        if (carried and window.is_last) or indices != list(range(len(window.lengths))):
            raise self._refuse(
                f"plan lost or repeated examples: {len(indices) - len(carried)} planned and {len(carried)} carried "
                f"over of {len(window.lengths)}"
            )
        if not (is_filled and all(0 < len(step) <= window.rows_per_step for step in steps)):
            raise self._refuse(f"plan made a step that is empty or has over {window.rows_per_step} rows")
        return steps, carried

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make one micro-batch. Raises PluginError when an example is not in it exactly once."""
        others = f" and {len(examples) - 1} more" if len(examples) > 1 else ""
        with self._attribute(f"collate of {examples[0].row_id}{others}" if examples else "collate"):
            batch: Any = self._collator.collate(examples)
        if not isinstance(batch, Batch):
            raise self._refuse(f"collate returned {type(batch).__name__}, expected a Batch")
        ids: Any = batch.row_ids
        if not (isinstance(ids, tuple) and all(isinstance(row_id, str) for row_id in ids)):
            raise self._refuse(f"collate gave the row_ids {ids!r:.60}, expected a tuple of text")
        if sorted(ids) != sorted(example.row_id for example in examples):
            raise self._refuse(
                f"collate made a batch of {counted(len(ids), 'example')} of {len(examples)}; every example must be in "
                "it once"
            )
        if not batch.examples:
            batch = replace(batch, examples=_in_order(examples, ids))
        elif (found := tuple(example.row_id for example in batch.examples)) != ids:
            raise self._refuse(f"collate gave the examples {found!r:.60} for the row_ids {ids!r:.60}")
        if batch.cu_seqlens is not None:
            boundaries, num_tokens = batch.cu_seqlens.tolist(), batch.input_ids_BT.numel()
            is_rising = sorted(set(boundaries)) == boundaries
            if boundaries[:1] != [0] or boundaries[-1] != num_tokens or not is_rising:
                raise self._refuse(
                    f"collate gave {num_tokens} tokens the cu_seqlens {boundaries!r:.60}, expected rising numbers "
                    "from 0 to all of them"
                )
        return cast(Batch, batch)


def _in_order(examples: Sequence[Example], row_ids: Sequence[str]) -> tuple[Example, ...]:
    """Return the examples in the order of these ids, which are their own; those of one id keep their order."""
    by_id: dict[str, list[Example]] = {}
    for example in reversed(examples):
        by_id.setdefault(example.row_id, []).append(example)
    return tuple(by_id[row_id].pop() for row_id in row_ids)


# --- training -----------------------------------------------------------------------------------


class LossStage(_Stage):
    """Computes the loss, and checks that it is a scalar with a gradient and that its denominator can be divided by."""

    def __init__(self, plugin: str, loss: Loss) -> None:
        super().__init__(plugin)
        self._loss = loss
        self.answers_only = self._declares("answers_only")
        self.batch_statistic = self._declares("batch_statistic")
        self.needs_adapter = self._declares("needs_adapter")
        self.shares_prefixes = self._declares("shares_prefixes")
        self.has_statistics = getattr(loss, "statistics", None) is not None
        self.has_extras = getattr(loss, "extras", None) is not None
        self.has_module = getattr(loss, "module", None) is not None
        self.has_precompute = getattr(loss, "precompute", None) is not None
        self.has_prepare = getattr(loss, "prepare", None) is not None
        self._precomputed_names: list[str] | None = None
        self._statistic_names: list[str] | None = None

    def denominator(self, batch: Batch) -> float:
        with self._attribute("denominator"):
            value: Any = self._loss.denominator(batch)
        if not isinstance(value, int | float):
            raise self._refuse(f"denominator returned {type(value).__name__}, expected a float")
        if isinstance(value, bool) or not 0 <= value < math.inf:
            raise self._refuse(f"denominator gave [{value}], expected numbers that are not below 0")
        return value

    def prepare(self, examples: Sequence[Example]) -> None:
        """Show the loss all examples of a split before the first step, where it asks for that."""
        if self.has_prepare and len(examples):
            loss: Any = self._loss
            with self._attribute("prepare"):
                loss.prepare(examples)

    def precompute(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """Return what the loss computes of a batch before training: by name, the same names for every batch, [E]."""
        import torch

        loss: Any = self._loss
        with self._attribute(f"precompute of {batch.row_ids[0]}"):
            values: Any = loss.precompute(lm, batch)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise self._refuse(f"precompute returned {type(values).__name__}, expected a dict of tensors by name")
        self._precomputed_names = names = self._precomputed_names or sorted(values)
        if sorted(values) != names:
            raise self._refuse(f"precompute has the names {sorted(values)}, and had {names} for another batch")
        num = len(batch.row_ids)
        for name, value in values.items():
            shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            if shape != [num]:
                raise self._refuse(f"precompute[{name!r}] is {shape}, expected a tensor of [{num}]: one an example")
        return {name: values[name].detach().float() for name in names}

    def with_extras(self, batch: Batch) -> Batch:
        """Return the batch, on the host, with what the loss adds to its extras. Raises PluginError for a wrong name."""
        from torch import Tensor

        if not self.has_extras:
            return batch
        loss: Any = self._loss
        with self._attribute(f"extras of {batch.row_ids[0]}"):
            extras: Any = loss.extras(batch)
        if not isinstance(extras, dict):
            raise self._refuse(f"extras returned {type(extras).__name__}, expected a dict of tensors by name")
        for name, value in extras.items():
            if not isinstance(value, Tensor) or not isinstance(name, str):
                raise self._refuse(f"extras[{name!r}] is {type(value).__name__}, expected a tensor by its name")
            if name in batch.extras:
                raise self._refuse(f"extras has the name {name!r}, which batch.extras has already; choose another")
        return replace(batch, extras={**batch.extras, **extras})

    def _declares(self, name: str) -> bool:
        with self._attribute(name):
            value: Any = getattr(self._loss, name, False)
        if not isinstance(value, bool):
            raise self._refuse(f"{name} is {value!r:.40}, expected True or False")
        return value

    def module(self, lm: LanguageModel) -> nn.Module:
        """Return the module whose parameters the loss trains beside the model's; only where `has_module`."""
        import torch

        loss: Any = self._loss
        with self._attribute("module"):
            made: Any = loss.module(lm)
        if not isinstance(made, torch.nn.Module):
            raise self._refuse(f"module returned {type(made).__name__}, expected a torch.nn.Module")
        if wrong := [name for name, p in made.named_parameters() if p.dtype != torch.float32 or not p.requires_grad]:
            raise self._refuse(
                f"module has the parameter {wrong[0]}, expected all to be fp32 and to require a gradient"
            )
        if next(made.parameters(), None) is None or next(made.buffers(), None) is not None:
            raise self._refuse("module has no parameters, or has buffers, expected parameters alone")
        return made

    def statistics(self, lm: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        """Return the batch's share of the statistics of its step, the same names for every batch."""
        loss: Any = self._loss
        with self._attribute("statistics"):
            values: Any = loss.statistics(lm, batch)
        if not isinstance(values, dict) or not values:
            raise self._refuse(f"statistics returned {type(values).__name__}, expected a dict of tensors by name")
        for name, value in values.items():
            self._check_scalar(f"statistics[{name!r}]", value)
        self._statistic_names = names = self._statistic_names or sorted(values)
        if sorted(values) != names:
            raise self._refuse(f"statistics has the names {sorted(values)}, and had {names} for another batch")
        return {name: values[name].detach() for name in names}

    def _check_scalar(self, name: str, value: Any) -> None:
        import torch

        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or value.ndim:
            what = f"a tensor of shape {list(value.shape)}" if is_tensor else type(value).__name__
            raise self._refuse(f"{name} is {what}, expected a tensor without dimensions")

    def check_total(self, denominator: float) -> float:
        """Return the denominator of a whole step. Raises PluginError when it is 0."""
        if not denominator > 0:
            raise self._refuse("denominator gave 0 for all of a step, expected more than 0")
        return denominator

    def __call__(self, lm: LanguageModel, batch: Batch) -> LossSum:
        import torch

        with self._attribute("loss"):
            out: Any = self._loss(lm, batch)
        if not isinstance(out, LossSum):
            raise self._refuse(f"loss returned {type(out).__name__}, expected a LossSum")
        self._check_scalar("sum", out.sum)
        if out.aux_loss is not None:
            self._check_scalar("aux_loss", out.aux_loss)
        for name, value in out.metrics.items():
            for part in value if isinstance(value, tuple) and len(value) == 2 else (value,):
                self._check_scalar(f"metrics[{name!r}]", part)
        if torch.is_grad_enabled() and not out.sum.requires_grad:
            raise self._refuse(
                "sum has no gradient: it is detached, or the forward uses no trained parameter (see the adapter)"
            )
        taken: list[Any] = [name for name in out.metrics if name in RESERVED_METRICS or not isinstance(name, str)]
        if taken:
            raise self._refuse(f"metrics has the name {taken[0]!r}, which the trainer reports itself; choose another")
        return out

    @staticmethod
    def metric_sums(out: LossSum) -> Iterator[tuple[str, Tensor]]:
        """Yield what adds up over micro-batches by name: each metric's sum, and the count of one that has its own."""
        for name, value in out.metrics.items():
            if isinstance(value, tuple):
                yield name, value[0].detach()
                yield f"{name}{_OWN_COUNT}", value[1].detach()
            else:
                yield name, value.detach()

    @staticmethod
    def metric_means(sums: Mapping[str, float], denominator: float) -> dict[str, float]:
        """Return the means of what `metric_sums` added up to; a metric whose own count is 0 has none."""
        divisors = {
            name: sums.get(f"{name}{_OWN_COUNT}", denominator) for name in sums if not name.endswith(_OWN_COUNT)
        }
        return {name: sums[name] / divisor for name, divisor in divisors.items() if divisor}

    def report_means(self, means: Mapping[str, float], place: str) -> dict[str, float]:
        """Return the means as they are reported: `perplexity` in place of `nll`. Raises PluginError unless finite."""
        if wrong := [name for name, value in means.items() if not math.isfinite(value)]:
            raise self._refuse(f"metrics[{wrong[0]!r}] is {means[wrong[0]]} in {place}")
        reported = {name: value for name, value in means.items() if name != "nll"}
        if "nll" in means and means["nll"] < _LARGEST_NLL:
            reported["perplexity"] = math.exp(means["nll"])
        return reported


# --- answers of the policy ----------------------------------------------------------------------


class RewardStage(_Stage):
    """Scores answers, and checks that each has a finite number or None."""

    def __init__(self, plugin: str, reward: Reward) -> None:
        super().__init__(plugin)
        self._reward = reward

    def prepare(self, lm: LanguageModel) -> None:
        """Give a reward that computes with a model the model of the run."""
        prepare: Any = getattr(self._reward, "prepare", None)
        if prepare is not None:
            with self._attribute("prepare"):
                prepare(lm)

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        with self._attribute("reward"):
            scores: Any = self._reward(answers)
        try:
            listed: list[Any] = list(scores)
        except TypeError:
            raise self._refuse(f"reward returned {type(scores).__name__}, expected a list of numbers") from None
        if len(listed) != len(answers):
            raise self._refuse(f"reward returned {counted(len(listed), 'score')} for {counted(len(answers), 'answer')}")
        for answer, score in zip(answers, listed, strict=True):
            if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
                raise self._refuse(
                    f"reward of an answer to {answer.question.row_id} is {score!r:.60}, expected a finite number, or "
                    "None to decline it"
                )
        return [None if score is None else float(score) for score in listed]


class RolloutStage(_Stage):
    """Makes the examples of a window, and checks that each step has some and that a checkpoint can hold them."""

    def __init__(self, plugin: str, rollout: Rollout) -> None:
        super().__init__(plugin)
        self._rollout = rollout
        with self._attribute("reading what it declares"):
            self.steps_per_rollout = rollout.steps_per_rollout
            self.num_iterations = rollout.num_iterations
            self.num_answers = rollout.num_answers
            self.max_new_tokens = rollout.max_new_tokens
            self.reward_weights: Any = getattr(rollout, "reward_weights", {})
            self.needs_reward: Any = getattr(rollout, "needs_reward", False)
        if not isinstance(self.needs_reward, bool):
            raise self._refuse(f"needs_reward is {self.needs_reward!r:.40}, expected True or False")
        for name in ("steps_per_rollout", "num_iterations", "num_answers", "max_new_tokens"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise self._refuse(f"{name} is {value!r:.40}, expected a whole number of at least 1")
        weights: Any = self.reward_weights
        is_right = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
        if not is_right or not all(_is_number(value) and math.isfinite(value) for value in weights.values()):
            raise self._refuse(f"reward_weights is {weights!r:.60}, expected finite numbers by names of reward plugins")

    def state_dict(self) -> dict[str, Any]:
        """Return what the rollout remembers between two windows, as JSON values; {} for one that remembers nothing."""
        own: Any = getattr(self._rollout, "state_dict", None)
        if own is None:
            return {}
        with self._attribute("state_dict"):
            state: Any = own()
        if not isinstance(state, Mapping):
            raise self._refuse(f"state_dict returned {type(state).__name__}, expected a mapping")
        if reason := _not_json(dict(state), "state_dict"):
            raise self._refuse(reason)
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        own: Any = getattr(self._rollout, "load_state_dict", None)
        if own is not None and state:
            with self._attribute("load_state_dict"):
                own(state)

    def __call__(self, policy: Policy, questions: Sequence[Question], rows_per_step: int) -> Rollouts:
        """Make the examples of the questions, of which `rows_per_step` are for each step."""
        with self._attribute("rollout"):
            made: Any = self._rollout(policy, questions)
        if not isinstance(made, Rollouts):
            raise self._refuse(f"rollout returned {type(made).__name__}, expected Rollouts")
        groups = []
        for example in made.examples:
            if not isinstance(example, Example):
                raise self._refuse(f"rollout gave {example!r:.60}, expected an Example")
            group: Any = example.group
            if not (isinstance(group, int) and 0 <= group < len(questions)):
                raise self._refuse(
                    f"rollout gave {example.row_id} the group {group!r:.40}, expected the position of its question, "
                    f"from 0 to {len(questions) - 1}"
                )
            if reason := _not_json(dict(example.extras), "extras"):
                raise self._refuse(f"rollout gave {example.row_id} {reason}")
            groups.append(group)
        if groups != sorted(groups):
            raise self._refuse("rollout gave examples in another order than their questions; sort them by group")
        steps = {group // rows_per_step for group in groups}
        if missing := [step for step in range(-(-len(questions) // rows_per_step)) if step not in steps]:
            first = missing[0] * rows_per_step
            raise self._refuse(
                f"rollout gave no example for the questions {first} to "
                f"{min(len(questions), first + rows_per_step) - 1}, which are the rows of a step"
            )
        if not all(isinstance(answer, Answer) for answer in made.answers):
            raise self._refuse("rollout gave answers of another type than Answer")
        try:
            metrics = named_scores("", made.metrics, "a window") if made.metrics else {}
        except PluginError as error:
            raise self._refuse(str(error)) from None
        if taken := sorted(metrics.keys() & RESERVED_METRICS):
            raise self._refuse(f"metrics has the name {taken[0]!r}, which the trainer reports itself; choose another")
        return Rollouts(tuple(made.examples), tuple(made.answers), metrics)


class OptimizerStage(_Stage):
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
        if not (_is_number(self.state_bytes) and 0 <= self.state_bytes < math.inf):
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
                if not (_is_number(value) and 0 <= value < math.inf):
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
                    if not (isinstance(value, Tensor) or (_is_number(value) and math.isfinite(value))):
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class ScheduleStage(_Stage):
    """Gives the factors of the learning rate, and checks that they are finite numbers of at least 0."""

    def __init__(self, plugin: str, schedule: Schedule) -> None:
        super().__init__(plugin)
        self._schedule = schedule
        with self._attribute("warmup_start"):
            self.warmup_start: Any = getattr(schedule, "warmup_start", 0.0)
        if not (_is_number(self.warmup_start) and 0 <= self.warmup_start <= 1):
            raise self._refuse(f"warmup_start is {self.warmup_start!r:.40}, expected a number from 0 to 1")

    def factor(self, step: int, num_steps: int) -> float:
        with self._attribute("factor"):
            factor: Any = self._schedule.factor(step, num_steps)
        if not (_is_number(factor) and 0 <= factor < math.inf):
            raise self._refuse(f"factor({step}, {num_steps}) is {factor!r:.40}, expected a finite number of at least 0")
        return float(factor)


class ControlStage(_Stage):
    """Asks a control for its decisions, and checks them and what it remembers."""

    def __init__(self, plugin: str, control: Control) -> None:
        super().__init__(plugin)
        self._control = control

    def after_step(self, report: StepReport) -> Decision | None:
        with self._attribute("after_step"):
            return self._checked("after_step", self._control.after_step(report))

    def after_evaluate(self, report: EvalReport) -> Decision | None:
        with self._attribute("after_evaluate"):
            return self._checked("after_evaluate", self._control.after_evaluate(report))

    def state_dict(self) -> dict[str, Any]:
        """Return what the control remembers. Raises PluginError unless JSON gives it back unchanged."""
        with self._attribute("state_dict"):
            state: Any = self._control.state_dict()
        try:
            if isinstance(state, Mapping) and json.loads(json.dumps(dict(state), allow_nan=False)) == dict(state):
                return dict(state)
        except (TypeError, ValueError):
            pass
        raise self._refuse(f"state_dict returned {state!r:.60}, expected a dict of JSON values")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._attribute("load_state_dict"):
            self._control.load_state_dict(state)

    def _checked(self, what: str, decision: Any) -> Decision | None:
        if decision is not None and not isinstance(decision, Decision):
            raise self._refuse(f"{what} returned {type(decision).__name__}, expected a Decision or None")
        for name in () if decision is None else ("evaluate", "save", "stop"):
            if not isinstance(answer := getattr(decision, name), bool):  # any text, even "no", would count as true
                raise self._refuse(f"{what} asked for {name}={answer!r:.60}, expected True or False")
        if decision is not None and not isinstance(decision.reason, str):
            raise self._refuse(f"{what} gave the reason {decision.reason!r:.60}, expected text")
        factor: Any = None if decision is None else decision.rate_factor
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if factor is not None and not (is_number and 0 < factor < math.inf):
            raise self._refuse(f"{what} asked for the rate_factor {factor!r}, expected a number above 0")
        return decision


class ExporterStage(_Stage):
    """Exports the result of a run, and checks that something was written."""

    def __init__(self, plugin: str, exporter: Exporter) -> None:
        super().__init__(plugin)
        self._exporter = exporter
        with self._attribute("reading what it declares"):
            self.rounding: Rounding = getattr(exporter, "rounding", "none")
            self.can_load = hasattr(exporter, "load")
        if self.rounding not in get_args(Rounding):
            raise self._refuse(
                f"its rounding is {self.rounding!r:.60}, expected one of {', '.join(get_args(Rounding))}"
            )

    def check(self, config: PretrainedConfig) -> None:
        with self._attribute("check"):
            self._exporter.check(config)

    def export(self, source: ExportSource, directory: Path) -> None:
        with self._attribute("export"):
            self._exporter.export(source, directory)
        if not any(path.is_file() for path in directory.rglob("*")):
            raise self._refuse("export wrote no file")

    def usage(self, directory: Path) -> str:
        with self._attribute("usage"):
            text: Any = self._exporter.usage(directory)
        if not isinstance(text, str):
            raise self._refuse(f"usage returned {type(text).__name__}, expected text")
        return text

    def load(self, directory: Path, *, trust_remote_code: bool = False) -> ExportedStage:
        """Load what was written there; only where `can_load`. `trust_remote_code` is for a `load` that asks for it."""
        exporter: Any = self._exporter
        options = {"trust_remote_code": trust_remote_code} if "trust_remote_code" in arguments_of(exporter.load) else {}
        with self._attribute("load"):
            exported = exporter.load(directory, **options)
        return ExportedStage(self._plugin, exported)


class ExportedStage(_Stage):
    """Answers from the files of an export, and checks the types of what is compared."""

    def __init__(self, plugin: str, exported: ExportedModel) -> None:
        super().__init__(plugin)
        self._exported = exported
        if lacking := [name for name in ("reader", "stop_ids", "prompt", "logits") if not hasattr(exported, name)]:
            raise self._refuse(f"load returned {type(exported).__name__}, which has no {' and no '.join(lacking)}")
        with self._attribute("the reader's name"):
            self.reader = str(exported.reader)
        with self._attribute("stop_ids"):
            self.stop_ids = frozenset(int(token_id) for token_id in exported.stop_ids)
        self.can_encode = hasattr(exported, "encode")

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        with self._attribute("prompt"):
            return [int(token_id) for token_id in self._exported.prompt(messages, tools)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; only where `can_encode`."""
        exported: Any = self._exported
        with self._attribute("encode"):
            return [int(token_id) for token_id in exported.encode(text)]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        with self._attribute("logits"):
            logits_TV = self._exported.logits(token_ids)
        shape, dtype = tuple(getattr(logits_TV, "shape", ())), str(getattr(logits_TV, "dtype", None))
        if len(shape) != 2 or shape[0] != len(token_ids) or dtype != "torch.float32":
            got = f"{dtype} {list(shape)}" if shape else type(logits_TV).__name__
            raise self._refuse(
                f"logits of {len(token_ids)} tokens are {got}, expected torch.float32 [{len(token_ids)}, V]"
            )
        return logits_TV


class AdapterStage(_Stage, Adapter):
    """Attaches, saves, loads and merges a plugin's adapter."""

    def __init__(self, plugin: str, adapter: Adapter) -> None:
        super().__init__(plugin)
        self._adapter = adapter

    def quantize(self, name: str, module: nn.Module) -> nn.Module | None:
        with self._attribute("quantize"):
            return self._adapter.quantize(name, module)

    def attach(self, lm: LanguageModel) -> None:
        with self._attribute("attach"):
            self._adapter.attach(lm)

    @property
    def embed(self) -> Callable[[Batch, Tensor], Tensor]:
        """The adapter's own `embed`, whose result is checked; AttributeError where it has none."""
        own: Callable[[Batch, Tensor], Tensor] = self._adapter.embed  # type: ignore[attr-defined]

        def checked(batch: Batch, embeds_BTD: Tensor) -> Tensor:
            shape, dtype = embeds_BTD.shape, embeds_BTD.dtype
            with self._attribute("embed"):
                try:
                    made: Any = own(batch, embeds_BTD)
                except KeyError as error:
                    name = error.args[0] if error.args else None
                    if not isinstance(name, str) or name in batch.extras:
                        raise
                    raise self._refuse(
                        f"embed reads batch.extras[{name!r}], and the collator of this run makes "
                        f"{', '.join(sorted(batch.extras)) or 'no extras'}; name a collator that makes it"
                    ) from error
            expected = f"{dtype} {list(shape)}"
            found = f"{made.dtype} {list(made.shape)}" if hasattr(made, "dtype") else type(made).__name__
            if found != expected:
                raise self._refuse(f"embed returned {found}, expected {expected}, as it was given")
            return made  # type: ignore[no-any-return]

        return checked

    def rate_scale(self, name: str) -> float:
        with self._attribute("rate_scale"):
            scale: Any = self._adapter.rate_scale(name)
        if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
            raise self._refuse(f"rate_scale of {name} is {scale!r}, expected a number above 0")
        return scale

    def disabled(self) -> AbstractContextManager[None]:
        with self._attribute("disabled"):
            return self._adapter.disabled()

    def save(self, directory: Path) -> None:
        with self._attribute("save"):
            self._adapter.save(directory)

    def load(self, directory: Path) -> None:
        with self._attribute("load"):
            self._adapter.load(directory)

    def merge(self, lm: LanguageModel) -> None:
        with self._attribute("merge"):
            self._adapter.merge(lm)

    def _explains_itself(self, error: BaseException, what: str) -> bool:
        is_disk = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
        return what == "save" and is_disk


def check_trainable(names: Set[Any], spec: ModelSpec) -> frozenset[str]:
    """Return the names that a plugin chose. Raises PluginError unless all are parameters of the language model."""
    if not names:
        raise PluginError("sftx_trainable returned no name, so nothing would train")
    if unknown := sorted(map(str, names - {*spec.parameter_names})):
        raise PluginError(
            f"sftx_trainable returned {counted(len(unknown), 'name')} that no parameter of the language model has "
            f"(first: {unknown[0]!r}); the names are those of spec.parameter_names"
        )
    return frozenset(names)


# --- evaluation ---------------------------------------------------------------------------------


class MetricStage(_Stage):
    """Scores answers, and checks that every score is a finite number with a name."""

    def __init__(self, plugin: str, metric: Metric, name: str) -> None:
        """`name`: the plugin's own name, under which a score without a name is reported."""
        super().__init__(plugin)
        self._metric = metric
        self._name = name
        self._has_said_declined = False

    def scores(self, predictions: Sequence[str], rows: Sequence[Question]) -> dict[str, float]:
        """Score a whole set of answers: means over the rows, or what `corpus` returns where the metric has one.

        Rows that the metric declines do not count; without any other row there is no score.
        """
        corpus: Any = getattr(self._metric, "corpus", None)
        if corpus is not None:
            extra: dict[str, Any] = {"rows": rows} if "rows" in arguments_of(corpus) else {}
            with self._attribute("corpus"):
                score = corpus(predictions, [row.reference for row in rows], **extra)
            return self._say_declined(len(rows)) if score is None else self._named("corpus", score, f"{len(rows)} rows")
        takes_row = "row" in arguments_of(self._metric)
        scored: list[tuple[str, dict[str, float]]] = []
        for prediction, row in zip(predictions, rows, strict=True):
            given = {"row": row} if takes_row else {}
            with self._attribute("metric"):
                score = self._metric(prediction, row.reference, **given)
            if score is not None:
                scored.append((row.row_id, self._named("metric", score, row.row_id)))
        if not scored:
            return self._say_declined(len(rows))
        first_id, first = scored[0]
        for row_id, scores in scored:
            if scores.keys() != first.keys():
                raise self._refuse(
                    f"the scores of {row_id} are {', '.join(scores)}, those of {first_id} {', '.join(first)}; give "
                    "every answer the same ones, whose means are reported"
                )
        return {name: sum(scores[name] for _, scores in scored) / len(scored) for name in first}

    def _say_declined(self, num_rows: int) -> dict[str, float]:
        if not self._has_said_declined:
            self._has_said_declined = True
            log.warning("%s: it declined all %d held-out rows, so it reports nothing", self, num_rows)
        return {}

    def _named(self, what: str, score: Any, of: str) -> dict[str, float]:
        if not isinstance(score, Mapping | int | float):
            raise self._refuse(f"{what} returned {type(score).__name__}, expected a float")
        try:
            return named_scores(self._name, score, of)
        except PluginError as error:
            raise self._refuse(str(error)) from None


class EvaluatorStage(_Stage):
    """Scores the model, and checks that every score is a finite number with a name."""

    def __init__(self, plugin: str, evaluator: Evaluator) -> None:
        super().__init__(plugin)
        self._evaluator = evaluator

    def evaluate(self, evaluation: Evaluation) -> object:
        """Return what the plugin returns; `named` checks it."""
        with self._attribute("evaluate"):
            return self._evaluator.evaluate(evaluation)

    def named(self, scores: object) -> dict[str, float]:
        """Return the plugin's scores as finite numbers by name. Raises PluginError."""
        if not isinstance(scores, Mapping):
            raise self._refuse(f"evaluate returned {type(scores).__name__}, expected a mapping of names to numbers")
        try:
            return named_scores("", scores, "the model")
        except PluginError as error:
            raise self._refuse(str(error)) from None


def named_scores(plugin: str, score: float | Mapping[str, float], of: str) -> dict[str, float]:
    """Return a score as finite numbers by name; a single number gets the plugin's name. Raises PluginError."""
    values: Mapping[str, Any] = score if isinstance(score, Mapping) else {plugin: score}
    if not values or not all(isinstance(name, str) for name in values):
        raise PluginError(f"the score of {of} has the names {list(values)!r:.60}, expected some text")
    numbers = {}
    for name, value in values.items():
        try:
            number = float(value) if isinstance(value, int | float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            which = "the score" if name == plugin else f"the score {name!r}"
            raise PluginError(f"{which} of {of} is {value!r:.60}, expected a finite number")
        numbers[name] = number
    return numbers
