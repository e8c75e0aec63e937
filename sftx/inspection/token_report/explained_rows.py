"""`sftx inspect`: select rows of a run's data and explain every token of each, for terminal, HTML page and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from sftx.config.options import Source
from sftx.data.dataset import Dataset
from sftx.data.ledger import Entry
from sftx.data.pipeline import Split
from sftx.data.row_encoder import EncodedRow, parse_record
from sftx.errors import DataError
from sftx.inspection.coverage import coverage_lines
from sftx.inspection.dataset_statistics import DatasetStatistics, dataset_statistics
from sftx.inspection.dataset_view import DatasetView, is_unreadable
from sftx.inspection.token_report.explained_tokens import ExplainedToken, explain_row
from sftx.types import Location, Record

Show = Literal["first", "longest", "dropped", "cut"]
Status = Literal["kept", "cut", "split", "filtered", "held out", "dropped"]
Place = tuple[str, int]
"""The path and the number of a row's location."""

_MAX_RECORD_CHARS: Final = 2000
"""A record that cannot be shown as tokens is shown as JSON of at most so many characters."""


@dataclass(frozen=True)
class ExplainedExample:
    """The tokens of one example of a row, or of what a dropped row would have become."""

    name: str
    tokens: tuple[ExplainedToken, ...]

    @property
    def num_label_tokens(self) -> int:
        """The first token of an example is never predicted, so it does not count."""
        return sum(token.trained for token in self.tokens[1:])


@dataclass(frozen=True)
class ExplainedRow:
    """One row of a source and the examples that it becomes."""

    number: int
    """The row's number, counted from 1 over all sources of the split."""
    where: str
    format: str
    status: Status
    reasons: tuple[str, ...]
    """Why the row is not kept as it was written."""
    length: int
    """The number of tokens before truncation; 0 when the row was never encoded."""
    examples: tuple[ExplainedExample, ...]
    record: str = ""
    """The record as JSON, if it cannot be shown as tokens."""


@dataclass(frozen=True)
class TokenReport:
    """The content of `sftx inspect`; `dataclasses.asdict` of it is the output of `sftx inspect --json`."""

    figures: DatasetStatistics
    rows: tuple[ExplainedRow, ...]
    chosen: str
    """A description of the rows that are shown."""
    coverage: tuple[str, ...] = ()
    """How much of the model's weights adapters reach, and what they leave as it is."""


@dataclass(frozen=True)
class RowSelection:
    """The rows that the user wants to see."""

    show: Show = "first"
    max_rows: int = 3
    rows: tuple[Place, ...] = ()
    """Rows named on the command line, which replace `show`: (path, line or row), or ("", n) for the nth of all."""


def inspect_rows(view: DatasetView, split: Split, selection: RowSelection) -> TokenReport:
    """Explain the selected rows. Raises SftxError for a row that does not exist or a source that cannot be read."""
    explainer = _RowExplainer(view, split)
    if selection.rows:
        rows, chosen = _named_rows(explainer, selection.rows), "as asked for"
    elif selection.show == "first":
        rows, chosen = _first_rows(explainer, selection.max_rows), "the first"
    else:
        rows = _rows_at(explainer, _find_places(explainer.data, selection.show, selection.max_rows))
        descriptions = {"longest": "the longest", "dropped": "dropped or filtered", "cut": "cut or split"}
        chosen = descriptions[selection.show]
    if not selection.rows and selection.max_rows == 0:
        chosen = ""
    return TokenReport(dataset_statistics(view, split), tuple(rows), chosen, coverage_lines(view))


def sample_rows(view: DatasetView, split: Split, max_rows: int) -> TokenReport:
    """Explain rows for an HTML page: some dropped, some cut, the longest, and the first rows up to `max_rows`."""
    explainer = _RowExplainer(view, split)
    places: dict[Place, None] = {}
    for show in ("dropped", "cut", "longest"):
        places |= dict.fromkeys(_find_places(explainer.data, show, max(1, max_rows // 5)))
    shows_all = explainer.data.ledger.num_rows <= max_rows
    rows = [] if shows_all else _rows_at(explainer, list(places)[:max_rows])
    numbers = {row.number for row in rows}
    first = [row for row in _first_rows(explainer, max_rows) if row.number not in numbers]
    rows += first[: max_rows - len(rows)]
    chosen = "all" if shows_all else "some of those that are dropped, truncated or longest, and the first"
    return TokenReport(dataset_statistics(view, split), tuple(sorted(rows, key=lambda row: row.number)), chosen)


def _find_places(data: Dataset, show: Show, max_rows: int) -> list[Place]:
    places: dict[Place, None] = {}
    if show == "longest":
        for index in np.argsort(-data.examples.lengths, kind="stable").tolist():
            if len(places) == max_rows:
                break
            places[_place(data.examples.where(index))] = None
        return list(places)
    actions = ("dropped", "filtered") if show == "dropped" else ("cut", "split")
    return list(dict.fromkeys(_place(e.where) for e in data.ledger.entries if e.action in actions))[:max_rows]


def _place(where: Location) -> Place:
    return where.path, where.number


class _RowExplainer:
    """Explains single rows of one split; the ledger of the encoded split says what became of each row."""

    def __init__(self, view: DatasetView, split: Split) -> None:
        self.view, self.split, self.data = view, split, view.dataset(split)
        self._encode = view.pipeline.encode if split == "train" else view.pipeline.encode_eval
        self._entries: dict[Place, list[Entry]] = {}
        for entry in self.data.ledger.entries:
            self._entries.setdefault(_place(entry.where), []).append(entry)

    def __call__(self, number: int, source: Source, where: Location, record: Record) -> ExplainedRow:
        entries = self._entries.get(_place(where), [])
        status: Status = entries[0].action if entries else "kept"
        is_dropped = status in ("dropped", "filtered", "held out")
        encode, row = self._encode, EncodedRow(where)
        explained: tuple[ExplainedExample, ...] = ()
        try:
            if not any(map(is_unreadable, entries)):
                row = encode(where, record, source)
                trained_row = EncodedRow(where) if is_dropped else row
                parsed = parse_record(record, EncodedRow(where), encode.parsers, source, encode.config)
                examples = explain_row(encode, parsed, trained_row)
                names = [e.row_id for e in trained_row.examples_from_group(0)] or [str(where)] * len(examples)
                explained = tuple(
                    ExplainedExample(name, tuple(tokens)) for name, tokens in zip(names, examples, strict=True)
                )
        except DataError:
            if not is_dropped:
                raise
        return ExplainedRow(
            number=number,
            where=str(where),
            format=row.format,
            status=status,
            reasons=tuple(
                dict.fromkeys(
                    entry.reason + (f" ({entry.length} tokens, {entry.kept} kept)" if entry.kept else "")
                    for entry in entries
                )
            ),
            length=sum(len(e.tokens) for e in explained) if status == "kept" else sum(e.length for e in entries),
            examples=explained,
            record="" if explained else _record_json(record),
        )


def _first_rows(explainer: _RowExplainer, max_rows: int) -> list[ExplainedRow]:
    rows = []
    for number, (source, where, record) in enumerate(explainer.view.records(explainer.split), 1):
        if number > max_rows:
            break
        rows.append(explainer(number, source, where, record))
    return rows


def _rows_at(explainer: _RowExplainer, places: Sequence[Place]) -> list[ExplainedRow]:
    """Return the rows at these places, in the order of the places."""
    rows: dict[Place, ExplainedRow] = {}
    missing = set(places)
    for number, (source, where, record) in enumerate(explainer.view.records(explainer.split), 1):
        if not missing:
            break
        if (place := _place(where)) in missing:
            rows[place] = explainer(number, source, where, record)
            missing.remove(place)
    return [rows[place] for place in places if place in rows]


def _named_rows(explainer: _RowExplainer, names: Sequence[Place]) -> list[ExplainedRow]:
    """Return the rows that the user named, in that order. Raises DataError for a row that does not exist."""
    rows: dict[Place, ExplainedRow] = {}
    number = 0
    for number, (source, where, record) in enumerate(explainer.view.records(explainer.split), 1):
        for path, named in names:
            is_same_file = path == where.path or where.path.endswith(f"/{path}")
            matches = number == named if not path else named == where.number and is_same_file
            if matches and (path, named) not in rows:
                rows[path, named] = explainer(number, source, where, record)
        if len(rows) == len(set(names)):
            break
    for path, named in names:
        if (path, named) not in rows:
            name = f"{path}:{named}" if path else str(named)
            raise DataError(f"--row {name}: there is no such row among the {number} of data.{explainer.split}")
    return [rows[name] for name in names]


def _record_json(record: Record) -> str:
    try:
        text = json.dumps(record, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # it is nested too deeply, or contains itself
        return "(cannot be written as JSON)"
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8 form
    return text if len(text) <= _MAX_RECORD_CHARS else f"{text[:_MAX_RECORD_CHARS]} ..."
