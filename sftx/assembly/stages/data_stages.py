"""Sources, parsers, templates and collators as stages."""

from __future__ import annotations

import logging
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

from sftx.assembly.stages.stage import Stage, not_json
from sftx.config.default_plugins import RESERVED_SCHEMES, SCHEME
from sftx.errors import DataError, counted
from sftx.types import (
    LEDGER_KEYS,
    Batch,
    Collator,
    Conversation,
    Example,
    Location,
    Message,
    Parsed,
    Parser,
    PlainText,
    Record,
    Row,
    RowSource,
    Segment,
    Step,
    Template,
    Tokens,
    ToolCall,
    Window,
)

log = logging.getLogger(__name__)


class RowSourceStage(Stage):
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


class ParserStage(Stage):
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
                    reason = not_json(item.extras, "extras")
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


class TemplateStage(Stage):
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


class CollatorStage(Stage):
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
