"""Encode one record: a record becomes examples, or entries of the ledger, in whichever process it is read.

record -> parser -> mark which turns are trained -> units (one example each) -> token ids and mask -> truncation.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Filters, Source
from sftx.data import sources, truncate
from sftx.data.encoder import Encoder, KnownTexts, Part
from sftx.data.ledger import Entry, Ledger
from sftx.errors import DataError, SftxError
from sftx.types import Conversation, Example, Location, Message, Parsed, PlainText, Question, Record, Tokens

NOTHING_TRAINED: Final = "no trained token"
EMPTY: Final = "every trained turn is empty"
_SIMILAR: Final = 0.75
"""`difflib`'s ratio from which a field is taken for a misspelt one: `ouput` is, `input` is not `input_ids`."""
NO_TURN: Final = "no assistant turn, so nothing to train"


@dataclass
class EncodedRow:
    """The examples of one record, and the ledger's entries when it was dropped or changed."""

    where: Location
    format: str = ""
    examples: list[Example] = field(default_factory=list)
    """`group` counts from 0 within the row; whoever collects rows adds the number of groups before it."""
    is_group: bool = False
    """Whether its examples are one group (a preference pair)."""
    has_turns: bool = False
    """Whether it is a conversation."""
    entries: list[Entry] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    @property
    def num_groups(self) -> int:
        return min(1, len(self.examples)) if self.is_group else len(self.examples)

    def drop(
        self, reason: str, *, length: int = 0, action: Literal["dropped", "filtered", "held out"] = "dropped"
    ) -> None:
        """Drop the whole row, whichever part of it is the cause."""
        self.examples.clear()
        self.questions.clear()
        self.entries[:] = [Entry(self.where, action, reason, length, 0)]

    def examples_from_group(self, first_group: int) -> list[Example]:
        """Return the examples with groups that count from `first_group`."""
        return [dataclasses.replace(example, group=first_group + example.group) for example in self.examples]


@dataclass(frozen=True)
class RowEncoder:
    """Encodes records with one set of parsers, one template and the options of `data`. It can be pickled."""

    parsers: Mapping[str, ParserStage]
    encoder: Encoder
    config: DataConfig
    questions: bool = False
    """Whether to keep a question for each held-out conversation, for evaluation by generation."""
    answer_length: int | None = None
    """Where rows are questions for a rollout, the tokens of its longest answer: an example is the prompt alone then."""
    wrapped: bool = False
    """Whether examples are cut to length later, in their concatenation, so that none is too long here."""

    def __call__(self, where: Location, record: Record, source: Source) -> EncodedRow:
        """Parse and encode a record. Raises DataError, naming `where`, unless `invalid_rows` drops such rows."""
        (row,) = self.rows([(where, record)], source)
        return row

    def rows(self, rows: Sequence[tuple[Location, Record]], source: Source) -> list[EncodedRow]:
        """Parse and encode records as one alone is. The tokenizer is given all texts of all of them at once."""
        filters = source.filters or self.config.filters
        rendered = [_Rendered(EncodedRow(where)) for where, _ in rows]
        for one, (_, record) in zip(rendered, rows, strict=True):
            try:
                self._render(parse_record(record, one.row, self.parsers, source, self.config), one, filters)
            except SftxError as error:  # raised below, after those of the rows before it
                one.error = error
        known: KnownTexts = {}
        self.encoder.learn((part for one in rendered for _, parts in one.units for part in parts), known)
        for row, one in ((one.row, one) for one in rendered):
            try:
                self._encode(one, filters, known)
            except SftxError as error:
                if isinstance(error, DataError) and self.config.invalid_rows == "drop":
                    row.drop(str(error).removeprefix(f"{row.where}: "))
                    continue
                if str(row.where) not in str(error):
                    error.args = (f"{row.where}: {error}",)
                raise
        return [one.row for one in rendered]

    def encode(self, parsed: Sequence[Parsed], row: EncodedRow, filters: Filters | None = None) -> EncodedRow:
        """Add the examples of a parsed record to `row`; where it has none, its entries say why."""
        rendered, filters = _Rendered(row), filters or self.config.filters
        self._render(parsed, rendered, filters)
        self._encode(rendered, filters, {})
        return row

    def _render(self, parsed: Sequence[Parsed], rendered: _Rendered, filters: Filters) -> None:
        """Decide which turns are trained, and render what becomes one example each, unless a filter drops the row."""
        row = rendered.row
        has_filter = filters.min_turns or filters.max_turns is not None
        if has_filter and (reason := filtered_by_turns(parsed, filters)):
            row.drop(reason, action="filtered")
            return
        marked = rendered.marked = [mark_trained(one, self.config) for one in parsed]
        if self.answer_length is not None:
            self._ask(marked, row, filters)
            return
        template = self.encoder.template
        units: Sequence[Parsed] = marked
        if template is not None and template.rewrites_history:
            units = [unit for one in marked for unit in split_units(one, self.encoder)]
        if not units:  # no result of the parser, or a template that makes one example of each trained turn, and none is
            row.drop(_reason_nothing_trained(marked))
        rendered.units = [(unit, self.encoder.parts(unit)) for unit in units]

    def _encode(self, rendered: _Rendered, filters: Filters, known: KnownTexts) -> None:
        """Add the examples of a rendered record to its row. `known` has ids of texts. Raises SftxError."""
        row, marked = rendered.row, rendered.marked
        if rendered.error is not None:
            raise rendered.error
        if not rendered.units:
            return
        row.is_group = len(marked) > 1
        row.has_turns = any(isinstance(one, Conversation) for one in marked)
        for unit, parts in rendered.units:
            self._encode_unit(unit, parts, row, filters, known)
            if not row.examples:
                return
        if row.is_group and len(row.examples) != len(marked):
            raise DataError(
                f"{row.where}: its {len(marked)} parts belong together, and {len(row.examples)} examples came of them; "
                "choose another data.long_rows, or a template that does not rewrite history"
            )
        if len(row.examples) > 1:
            row.examples = [
                dataclasses.replace(example, row_id=f"{row.where}#{n + 1}", group=0 if row.is_group else n)
                for n, example in enumerate(row.examples)
            ]
        if self.questions:
            row.questions += questions_of(marked, row, self.encoder)

    def _encode_unit(
        self, unit: Parsed, parts: Sequence[Part], row: EncodedRow, filters: Filters, known: KnownTexts
    ) -> None:
        """Add the examples of one unit to `row`, or drop the whole row. `known` has ids of texts."""
        config = self.config
        labelled = self.labelled(unit, known=known, parts=parts)
        length = len(labelled[0])
        if True not in labelled[1][1:]:
            row.drop(_reason_nothing_trained([unit]), length=length)
            return
        if is_empty(unit, config):
            row.drop(EMPTY, length=length)
            return
        if not filters.min_length <= length <= (filters.max_length or length):
            bound = "min_length" if length < filters.min_length else "max_length"
            row.drop(f"filters.{bound}={getattr(filters, bound)}", length=length, action="filtered")
            return
        pieces: list[Any] = [slice(None)]
        if length > config.max_length and not self.wrapped:
            if config.long_rows == "error":
                raise DataError(f"{row.where}: {length} tokens, more than data.max_length={config.max_length}")
            encode = functools.partial(self.labelled, known=known)
            _, labelled, pieces = truncate.fit(unit, labelled, config, self.encoder.is_control, encode)
            if not pieces:
                is_filled = config.long_rows != "drop" and f"its prompt alone fills max_length={config.max_length}"
                row.drop(is_filled or f"longer than max_length={config.max_length}", length=length)
                return
            action: Literal["cut", "split"] = "split" if config.long_rows == "split" else "cut"
            reason = f"longer than max_length={config.max_length}"
            row.entries.append(Entry(row.where, action, reason, length, sum(map(len, pieces))))
        token_ids, loss_mask = np.asarray(labelled[0], np.int32), np.asarray(labelled[1], np.bool_)
        is_weighted = labelled[2].count(1.0) < len(labelled[2])
        weights = np.asarray(labelled[2], np.float32) if is_weighted else None
        for kept in pieces:
            kept_weights = weights[kept] if weights is not None and (weights[kept] != 1).any() else None
            row.examples.append(Example(token_ids[kept], loss_mask[kept], str(row.where), 0, kept_weights, unit.extras))

    def _ask(self, marked: Sequence[Parsed], row: EncodedRow, filters: Filters) -> None:
        """Make a question of a row whose turns are marked, and an example of its prompt, or drop the row."""
        assert self.answer_length is not None
        question = next(questions_of(marked, row, self.encoder, answered=False), None)
        if question is None:
            raise DataError(
                f"{row.where}: is no conversation, and a run with a rollout asks the model for answers; give rows that "
                "end with a user's turn, or with an answer"
            )
        row.has_turns = True
        length = len(question.prompt_ids)
        if not filters.min_length <= length <= (filters.max_length or length):
            bound = "min_length" if length < filters.min_length else "max_length"
            row.drop(f"filters.{bound}={getattr(filters, bound)}", length=length, action="filtered")
        elif length + self.answer_length > self.config.max_length:
            reason = (
                f"its prompt leaves no room for {self.answer_length} tokens within max_length={self.config.max_length}"
            )
            if self.config.long_rows == "error":
                raise DataError(f"{row.where}: {length} tokens: {reason}")
            row.drop(reason, length=length)
        else:
            row.examples.append(prompt_example(question, 0))
            row.questions.append(question)

    def trains_stop(self, row: EncodedRow) -> bool:
        """Return whether an example of the row trains one of the template's stop tokens."""
        stop = self.encoder.stop_ids
        return any(np.isin(example.token_ids[example.loss_mask], stop).any() for example in row.examples)

    def labelled(
        self, unit: Parsed, *, known: KnownTexts | None = None, parts: Sequence[Part] | None = None
    ) -> truncate.LabelledTokens:
        """Encode a unit, and apply the options that decide about single tokens to its loss mask.

        `known` collects the ids of texts, so that conversations that share turns encode each of them once. `parts` are
        those of the unit, where the caller has them.
        """
        encoder = self.encoder
        parts = encoder.parts(unit) if parts is None else parts
        token_ids, loss_mask, weights = encoder.joined(parts, {} if known is None else known)
        trained = [True] * len(token_ids) if self.config.train_on_prompt else loss_mask
        if not self.config.train_turn_end and isinstance(unit, Conversation):
            stop, is_ended, trained = set(encoder.stop_ids), False, [*trained]
            for at, token in enumerate(token_ids):
                # From the stop token to the end of what is trained: the newline after it as well.
                is_ended = loss_mask[at] and (is_ended or token in stop)
                trained[at] = trained[at] and not is_ended
        return token_ids, trained, weights


@dataclass
class _Rendered:
    """A record on its way to examples: parsed and rendered, so that its texts are known, and not encoded yet."""

    row: EncodedRow
    marked: Sequence[Parsed] = ()
    """What the parser made of it, with turns marked as trained or not."""
    units: Sequence[tuple[Parsed, Sequence[Part]]] = ()
    """What becomes one example each, with what it is rendered as. Empty for a row that is left out."""
    error: SftxError | None = None


def parse_record(
    record: Record, row: EncodedRow, parsers: Mapping[str, ParserStage], source: Source, config: DataConfig
) -> Sequence[Parsed]:
    """Parse a record with the requested format, or the first parser that accepts it, and note the format in `row`."""
    if source.columns:
        record = sources.mapped(record, source.columns, row.where)
    row.format = source.format or config.format or ""
    if not row.format:
        for name, parser in parsers.items():
            if parser.accepts(record):
                row.format = name
                break
        else:
            raise DataError(f"{row.where}: {_say_no_format(record, parsers)}")
    return parsers[row.format].parse(record, row.where)


def _say_no_format(record: Record, parsers: Mapping[str, ParserStage]) -> str:
    """Return the error of a record that no parser accepts: the misspelt field and the format that is nearest to it.

    Only if none of the record's fields is similar to one that a format needs, all formats are listed.
    """
    needs = {name: re.sub(r"\(.*?\)", "", parser.fields).replace(",", " ").split() for name, parser in parsers.items()}
    similar: dict[str, dict[str, str]] = {}
    """For each format, its fields that the record lacks and has under a similar name."""
    scores = {}
    for name, wanted in needs.items():
        others = [str(key) for key in record if key not in wanted]
        close = {one: difflib.get_close_matches(one, others, n=1, cutoff=_SIMILAR) for one in wanted}
        similar[name] = {one: close[one][0] for one in wanted if one not in record and close[one]}
        present = sum(one in record for one in wanted)
        scores[name] = (present + 0.9 * len(similar[name])) / max(1, len(wanted))
    nearest = max(scores, key=lambda name: scores[name], default="")
    lacking = [one for one in needs.get(nearest, ()) if one not in record]
    found = ", ".join(sorted(map(repr, record)))
    advice = "say with `columns` of the source which fields hold them"
    if lacking and scores[nearest] > 0:
        format_ = f"the format {nearest} ({', '.join(needs[nearest])})"
        if misspelt := similar[nearest]:
            unknown, meant = (", ".join(map(repr, names)) for names in (misspelt.values(), misspelt))
            is_one = len(misspelt) == 1
            return (
                f"the field{'' if is_one else 's'} {unknown:.200} {'is' if is_one else 'are'} unknown; did you mean "
                f"{meant} of {format_}? If not, {advice}"
            )
        return f"{format_} needs {', '.join(map(repr, lacking))} too, and the row has {found:.200}; {advice}"
    known = "; ".join(f"{name}: {', '.join(wanted)}" for name, wanted in needs.items())
    return f"no format has the fields {found:.200}; known are {known}; or {advice}"


def filtered_by_turns(parsed: Sequence[Parsed], filters: Filters) -> str | None:
    """Return the filter that a conversation's number of turns violates, or None."""
    for one in parsed:
        if isinstance(one, Conversation):
            turns = sum(message.role != "system" for message in one.messages)
            if turns < filters.min_turns:
                return f"filters.min_turns={filters.min_turns}"
            if filters.max_turns is not None and turns > filters.max_turns:
                return f"filters.max_turns={filters.max_turns}"
    return None


def mark_trained(parsed: Parsed, config: DataConfig) -> Parsed:
    """Decide for every turn whether it is trained, and replace the system message where the run gives one."""
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
    if config.system is None and all(message.trained == on for message, on in zip(messages, trained, strict=True)):
        return parsed
    return dataclasses.replace(
        parsed,
        messages=tuple(
            message if message.trained == on else dataclasses.replace(message, trainable=on)
            for message, on in zip(messages, trained, strict=True)
        ),
    )


def split_units(parsed: Parsed, encoder: Encoder) -> Iterator[Parsed]:
    """Yield what becomes one example each: the whole, or each trained turn where the template rewrites history."""
    template = encoder.template
    if not isinstance(parsed, Conversation) or template is None or not template.rewrites_history:
        yield parsed
    else:
        for end, message in enumerate(parsed.messages, 1):
            if message.trained:
                yield dataclasses.replace(parsed, messages=(*_untrained(parsed.messages[: end - 1]), message))


def _untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(dataclasses.replace(message, trainable=False) for message in messages)


def why_nothing_trained(parsed: Sequence[Parsed], config: DataConfig) -> str | None:
    """Return the reason for which a record with these parts, whose turns are marked, trains nothing, or None.

    Whether the text of a trained turn gives a label token is not known before it is encoded.
    """
    for one in parsed:
        match one:
            case Conversation(messages=messages):
                if not any(message.trained or config.train_on_prompt for message in messages):
                    return _reason_nothing_trained(parsed)
            case Tokens(loss_mask=mask):
                if not any(on or config.train_on_prompt for on in mask[1:]):
                    return NOTHING_TRAINED
        if is_empty(one, config):
            return NOTHING_TRAINED if isinstance(one, PlainText) else EMPTY
    return None if parsed else NOTHING_TRAINED


def is_empty(parsed: Parsed, config: DataConfig) -> bool:
    """Return whether what is trained has no text: it would teach the model to answer with nothing."""
    if isinstance(parsed, Conversation):
        trained = [message for message in parsed.messages if message.trained]
        has_content = any(m.content.strip() or m.reasoning.strip() or m.tool_calls for m in trained)
        return not has_content and not config.train_on_prompt
    return isinstance(parsed, PlainText) and not parsed.text


def _reason_nothing_trained(parsed: Sequence[Parsed]) -> str:
    turns = [message for one in parsed if isinstance(one, Conversation) for message in one.messages]
    return NO_TURN if turns and not any(turn.role == "assistant" for turn in turns) else NOTHING_TRAINED


def questions_of(
    parsed: Sequence[Parsed], row: EncodedRow, encoder: Encoder, *, answered: bool = True
) -> Iterator[Question]:
    """Yield the question of a parsed record whose turns are marked, if it ends with an assistant's turn.

    Without `answered` it may end with another turn: then all of it is asked, and no answer is expected.
    """
    for one in parsed[:1]:  # of a preference pair, the preferred answer
        if not isinstance(one, Conversation) or not one.messages:
            continue
        answer = one.messages[-1] if one.messages[-1].role == "assistant" else None
        if answer is not None or not answered:
            before = one.messages if answer is None else one.messages[:-1]
            # The prompt is encoded as in training: how a text is split into pieces depends on which turns are trained.
            rewrites = encoder.template is not None and encoder.template.rewrites_history
            asked = dataclasses.replace(one, messages=_untrained(before) if rewrites else before)
            expected: list[int] = [] if answer is None else answer_ids(asked, answer, encoder)
            yield Question(
                row_id=str(row.where),
                prompt=before[-1].content if before else "",
                prompt_ids=encoder.prompt(asked),
                reference=str(encoder.tokenizer.decode(expected, skip_special_tokens=True)),
                format=row.format,
                messages=before,
                tools=one.tools,
                extras=one.extras,
            )


def prompt_example(question: Question, group: int) -> Example:
    """Return a question as an example, of which nothing is trained."""
    token_ids = np.asarray(question.prompt_ids, np.int32)
    return Example(token_ids, np.zeros(len(token_ids), np.bool_), question.row_id, group, extras=question.extras)


def answer_ids(asked: Conversation, answer: Message, encoder: Encoder) -> list[int]:
    """Return the token ids of an answer as a model would generate it, without the stop token.

    It has its reasoning and its calls in the template's form. Raises DataError.
    """
    turn = dataclasses.replace(answer, trainable=True)
    token_ids, loss_mask, _ = encoder.encode(dataclasses.replace(asked, messages=(*_untrained(asked.messages), turn)))
    trained = itertools.compress(token_ids, loss_mask)
    return list(itertools.takewhile(lambda token: token not in encoder.stop_ids, trained))


class RowCounts(Protocol):
    """The account of the rows that were read so far."""

    ledger: Ledger
    has_turns: bool
    """Whether any row was a conversation."""
    trains_stop: bool
    """Whether any example trains one of the template's stop tokens."""


def check_rows(rows: RowCounts, encode: RowEncoder, first: str, *, max_dropped: float | None = None) -> None:
    """Raise DataError for too large a share of dropped rows, or a stop token that no row trains.

    A model whose stop token is never trained does not stop. `first` is the id of a row, named in the error.
    """
    rows.ledger.check(encode.config.max_dropped if max_dropped is None else max_dropped)
    template = encode.encoder.template
    needs_stop = template is not None and encode.answer_length is None and encode.config.train_turn_end
    if template is not None and needs_stop and rows.has_turns and not rows.trains_stop:
        raise DataError(
            f"{first}: no row trains the stop token {', '.join(template.stop)}, so the model would never end its "
            "answer; raise data.max_length if every row was cut, or correct the template"
        )
