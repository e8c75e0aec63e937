"""A record becomes encoded examples, or entries of the ledger: a function of that one record, in any process.

record -> parser -> what is trained of it -> units (one example each) -> ids and mask -> what fits `max_length`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sftx.assembly import data_checks
from sftx.config.options import DataConfig, Filters, Source
from sftx.data import sources, truncate
from sftx.data.encoder import Encoder
from sftx.data.ledger import Entry, Ledger
from sftx.errors import DataError, PluginError, SftxError, one_line
from sftx.types import Conversation, Example, Location, Message, Parsed, Parser, Record

NOTHING_TRAINED: Final = "no trained token"
EMPTY: Final = "every trained turn is empty"
NO_TURN: Final = "no assistant turn, so nothing to train"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as arrays, small to keep and to send."""

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    weights: NDArray[np.float32] | None
    part: int
    """Counted from 1 among the examples of its row; 0 when it is the only one."""
    extras: Mapping[str, Any]

    def example(self, where: Location, group: int) -> Example:
        return Example(
            token_ids=self.token_ids.tolist(),
            loss_mask=self.loss_mask.tolist(),
            row_id=f"{where}#{self.part}" if self.part else str(where),
            group=group,
            weights=None if self.weights is None else self.weights.tolist(),
            extras=self.extras,
        )


@dataclass(frozen=True)
class Question:
    """A held-out conversation without its last turn, and that turn as the right answer."""

    row_id: str
    prompt: str
    """The last turn before the answer, as a person reads it."""
    prompt_ids: list[int]
    reference: str


@dataclass
class Row:
    """What became of one record."""

    where: Location
    format: str = ""
    examples: list[Encoded] = field(default_factory=list)
    is_group: bool = False
    """Whether its examples belong together (a preference pair)."""
    has_turns: bool = False
    """Whether it is a conversation."""
    entries: list[Entry] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def drop(self, reason: str, *, length: int = 0, action: Literal["dropped", "filtered"] = "dropped") -> None:
        """Takes the whole row out, whatever part of it was to blame."""
        self.examples.clear()
        self.questions.clear()
        self.entries[:] = [Entry(self.where, action, reason, length, 0)]

    def as_examples(self, first_group: int) -> list[Example]:
        """Its examples, one group each unless they belong together."""
        return [
            one.example(self.where, first_group + (0 if self.is_group else n)) for n, one in enumerate(self.examples)
        ]


@dataclass(frozen=True)
class RowEncoder:
    """Turns records into rows with one set of parsers, template and options."""

    parsers: Mapping[str, Parser]
    encoder: Encoder
    config: DataConfig
    questions: bool = False
    """Whether to keep what can be asked of a row, for evaluation by generation."""
    wrapped: bool = False
    """Whether examples are cut to length later, where their concatenation is; none is too long then."""

    def __call__(self, where: Location, record: Record, source: Source) -> Row:
        """Raises DataError, naming `where`, for a record that cannot be read, unless `invalid_rows` drops those."""
        row = Row(where)
        try:
            self.encode(self.parse(record, row, source), row, source.filters)
        except SftxError as error:
            if isinstance(error, DataError) and self.config.invalid_rows == "drop":
                row.drop(str(error).removeprefix(f"{where}: "))
                return row
            if str(where) not in str(error):
                error.args = (f"{where}: {error}",)
            raise
        return row

    def parse(self, record: Record, row: Row, source: Source) -> Sequence[Parsed]:
        """What the record of `row` holds, read as its source is. Raises DataError."""
        return parse(record, row, self.parsers, source, self.config)

    def encode(self, parsed: Sequence[Parsed], row: Row, filters: Filters | None = None) -> Row:
        """Adds the examples of what a parser found to `row`; none when its entries say why."""
        filters = filters or self.config.filters
        if reason := turns_filtered(parsed, filters):
            row.drop(reason, action="filtered")
            return row
        marked = [mark(one, self.config) for one in parsed]
        found = [unit for one in marked for unit in units(one, self.encoder)]
        if not found:  # nothing parsed, or a template that makes an example of each trained turn, and none is
            row.drop(_why_nothing_is_trained(marked))
            return row
        row.is_group = len(parsed) > 1
        row.has_turns = any(isinstance(one, Conversation) for one in parsed)
        for unit in found:
            if not self._add(unit, row, filters):
                return row
        if row.is_group and len(row.examples) != len(parsed):
            raise DataError(
                f"{row.where}: its {len(parsed)} parts belong together, and {len(row.examples)} examples came of them; "
                "choose another data.long_rows, or a template that does not rewrite history"
            )
        if len(row.examples) > 1:
            row.examples = [dataclasses.replace(one, part=n) for n, one in enumerate(row.examples, 1)]
        if self.questions:
            row.questions += _questions(marked, row.where, self.encoder)
        return row

    def _add(self, unit: Parsed, row: Row, filters: Filters) -> bool:
        """Encodes one unit into the row; False when that takes the whole row out."""
        config, where = self.config, row.where
        token_ids, loss_mask, weights = self.labelled(unit)
        length = len(token_ids)
        if not any(loss_mask[1:]):
            row.drop(_why_nothing_is_trained([unit]), length=length)
            return False
        said = not isinstance(unit, Conversation) or any(m.trained and _says_something(m) for m in unit.messages)
        if not said and not config.train_on_prompt:
            row.drop(EMPTY, length=length)  # it would teach to say nothing
            return False
        if not filters.min_length <= length <= (filters.max_length or length):
            bound = "min_length" if length < filters.min_length else "max_length"
            row.drop(f"filters.{bound}={getattr(filters, bound)}", length=length, action="filtered")
            return False
        cut = truncate.Truncated(unit, (token_ids, loss_mask, weights), [np.arange(length)])
        if length > config.max_length and not self.wrapped:
            if config.long_rows == "error":
                raise DataError(f"{where}: {length} tokens, more than data.max_length={config.max_length}")
            cut = truncate.fit(unit, cut.labelled, config, self.encoder.is_control, self.labelled)
            reason = f"longer than max_length={config.max_length}"
            if not cut.kept:
                fills = config.long_rows != "drop" and f"its prompt alone fills max_length={config.max_length}"
                row.drop(fills or reason, length=length)
                return False
            action: Literal["cut", "split"] = "split" if config.long_rows == "split" else "cut"
            row.entries.append(Entry(where, action, reason, length, sum(map(len, cut.kept))))
        extras = _json(unit.extras)
        row.examples += [_arrays(cut.labelled, kept, extras) for kept in cut.kept]
        return True

    def trains_stop(self, row: Row) -> bool:
        """Whether an example of the row trains one of the template's stop tokens."""
        stop = self.encoder.stop_ids
        return any(np.isin(one.token_ids[one.loss_mask], stop).any() for one in row.examples)

    def labelled(self, unit: Parsed) -> truncate.LabelledTokens:
        """Ids, mask and weights of what `units` gave, with what the options say of single tokens."""
        token_ids, loss_mask, weights = self.encoder.encode(unit)
        ends = [False] * len(token_ids)
        if not self.config.train_turn_end and isinstance(unit, Conversation):
            stop, ended = set(self.encoder.stop_ids), False
            for at, token in enumerate(token_ids):
                # From the stop token to the end of what is trained: the newline after it as well.
                ends[at] = ended = loss_mask[at] and (ended or token in stop)
        everything = self.config.train_on_prompt
        trained = [(on or everything) and not end for on, end in zip(loss_mask, ends, strict=True)]
        return token_ids, trained, weights


def parse(
    record: Record, row: Row, parsers: Mapping[str, Parser], source: Source, config: DataConfig
) -> Sequence[Parsed]:
    """What the record of `row` holds, by the parser of the wanted format or the first that accepts it."""
    where = row.where
    record = sources.mapped(record, source.columns, where)
    accepting = (name for name, parser in parsers.items() if parser.accepts(record))
    row.format = source.format or config.format or next(accepting, "")
    if not row.format:
        known = "; ".join(f"{name}: {parser.fields}" for name, parser in parsers.items())
        fields = ", ".join(sorted(map(repr, record)))
        raise DataError(
            f"{where}: no format has the fields {fields:.200}; known are {known}; or say with `columns` of the source "
            "which fields hold them"
        )
    parser = parsers[row.format]
    return data_checks.parsed(parser, parser.parse(record, where))


def turns_filtered(parsed: Sequence[Parsed], filters: Filters) -> str | None:
    """Why a conversation has too few or too many turns; None when it has not, or is none."""
    for one in parsed:
        if isinstance(one, Conversation):
            turns = sum(message.role != "system" for message in one.messages)
            if turns < filters.min_turns:
                return f"filters.min_turns={filters.min_turns}"
            if filters.max_turns is not None and turns > filters.max_turns:
                return f"filters.max_turns={filters.max_turns}"
    return None


def mark(parsed: Parsed, config: DataConfig) -> Parsed:
    """A conversation whose turns all say whether they are trained, with the system text that the run gives it."""
    if not isinstance(parsed, Conversation):
        return parsed
    messages = parsed.messages
    if config.system is not None:
        first = (Message("system", config.system),) if config.system else ()
        messages = (*first, *(message for message in messages if message.role != "system"))
    trained = [m.role in config.train_roles if m.trainable is None else m.trainable for m in messages]
    if config.train_turns == "last":
        last = max((n for n, on in enumerate(trained) if on), default=-1)
        trained = [n == last for n in range(len(trained))]
    return dataclasses.replace(
        parsed,
        messages=tuple(
            message if message.trained == on else dataclasses.replace(message, trainable=on)
            for message, on in zip(messages, trained, strict=True)
        ),
    )


def units(parsed: Parsed, encoder: Encoder) -> Iterator[Parsed]:
    """What becomes one example each: where a template rewrites history, every trained turn with what led to it."""
    template = encoder.template
    if not isinstance(parsed, Conversation):
        yield parsed
    elif template is None:
        raise DataError(f"a conversation needs a template, and the run has none{encoder.advice()}")
    elif not template.rewrites_history:
        yield parsed
    else:
        for end, message in enumerate(parsed.messages, 1):
            if message.trained:
                yield dataclasses.replace(parsed, messages=(*_untrained(parsed.messages[: end - 1]), message))


def _untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(dataclasses.replace(message, trainable=False) for message in messages)


def _says_something(message: Message) -> bool:
    return bool(message.content.strip() or message.reasoning.strip() or message.tool_calls)


def _why_nothing_is_trained(parsed: Sequence[Parsed]) -> str:
    turns = [message for one in parsed if isinstance(one, Conversation) for message in one.messages]
    return NO_TURN if turns and not any(turn.role == "assistant" for turn in turns) else NOTHING_TRAINED


def _arrays(labelled: truncate.LabelledTokens, kept: NDArray[np.int64], extras: Mapping[str, Any]) -> Encoded:
    """Return the example that keeps the tokens of these indices; weights that are all 1 are left out."""
    token_ids, loss_mask, weights = labelled
    weights_T = np.asarray(weights, np.float64)[kept]
    return Encoded(
        token_ids=np.asarray(token_ids, np.int32)[kept],
        loss_mask=np.asarray(loss_mask, np.bool_)[kept],
        weights=weights_T.astype(np.float32) if (weights_T != 1).any() else None,
        part=0,
        extras=extras,
    )


def _json(extras: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same, as the cache will give it. Raises PluginError when it cannot."""
    if not extras:
        return extras
    try:
        values: Mapping[str, Any] = json.loads(json.dumps(extras, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PluginError(f"a parser gave extras that are no JSON values: {one_line(error)}") from error
    return values


def _questions(parsed: Sequence[Parsed], where: Location, encoder: Encoder) -> Iterator[Question]:
    for one in parsed[:1]:  # of a preference pair, the answer that is preferred
        if isinstance(one, Conversation) and one.messages and one.messages[-1].role == "assistant":
            *before, answer = one.messages
            # Asked as it is trained: where a text is encoded in pieces depends on what is trained.
            rewrites = encoder.template is not None and encoder.template.rewrites_history
            asked = dataclasses.replace(one, messages=_untrained(before) if rewrites else tuple(before))
            yield Question(
                row_id=str(where),
                prompt=before[-1].content if before else "",
                prompt_ids=encoder.prompt(asked),
                reference=_said(asked, answer, encoder),
            )


def _said(asked: Conversation, answer: Message, encoder: Encoder) -> str:
    """The answer as a model that was trained on it gives it, and as what it generates is decoded: with its reasoning
    and its calls in the template's form, up to the stop token."""
    turn = dataclasses.replace(answer, trainable=True)
    whole = dataclasses.replace(asked, messages=(*_untrained(asked.messages), turn))
    token_ids, loss_mask, _ = encoder.encode(whole)
    said = itertools.compress(token_ids, loss_mask)
    until_stop = itertools.takewhile(lambda token: token not in encoder.stop_ids, said)
    return str(encoder.tokenizer.decode(list(until_stop), skip_special_tokens=True))


class Account(Protocol):
    """What is known of the rows that were read so far."""

    ledger: Ledger
    has_turns: bool
    """Whether any row was a conversation."""
    trains_stop: bool
    """Whether any example trains one of the template's stop tokens."""


def check_rows(rows: Account, encode: RowEncoder, first: str, *, max_dropped: float | None = None) -> None:
    """Raises DataError for too large a share of dropped rows, or a stop token that no row trains.

    A model whose stop token is never trained does not stop. Rows that were cut cannot count. `first`: a row's id.
    """
    rows.ledger.check(encode.config.max_dropped if max_dropped is None else max_dropped)
    template = encode.encoder.template
    if template is not None and rows.has_turns and not rows.trains_stop and encode.config.train_turn_end:
        raise DataError(
            f"{first}: no row trains the stop token {', '.join(template.stop)}, so the model would never end its "
            "answer; raise data.max_length if every row was cut, or mend the template"
        )
