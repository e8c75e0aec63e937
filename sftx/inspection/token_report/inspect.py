"""A run's rows become an account of every token: what `sftx inspect` shows on the terminal, as a page and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from sftx.config.options import Source
from sftx.data.dataset import Dataset
from sftx.data.ledger import Entry
from sftx.data.row_encoder import EncodedRow, parse_record
from sftx.errors import DataError
from sftx.inspection.dataset_view import Look, Split, is_unreadable
from sftx.inspection.figures import Figures, figures
from sftx.inspection.token_report.tokens import Token, examples
from sftx.types import Location, Record

Show = Literal["first", "longest", "dropped", "cut"]
Status = Literal["kept", "cut", "split", "filtered", "dropped"]
Place = tuple[str, int]
"""Path and number of a row's location."""

_MOST_OF_A_RECORD: Final = 2000
"""Characters of a record that is shown as it was written."""


@dataclass(frozen=True)
class ShownExample:
    """One example, or what would have been one."""

    name: str
    tokens: tuple[Token, ...]

    @property
    def num_label_tokens(self) -> int:
        """Trained ones; the first token of an example never is."""
        return sum(token.trained for token in self.tokens[1:])


@dataclass(frozen=True)
class ShownRow:
    """One row of a source and what becomes of it."""

    number: int
    """Counted from 1 over all sources of the split."""
    where: str
    format: str
    status: Status
    reasons: tuple[str, ...]
    """Why it is not kept as it was written."""
    length: int
    """Tokens as it was written; 0 when it was never encoded."""
    examples: tuple[ShownExample, ...]
    record: str = ""
    """The record as JSON, where it cannot be shown as tokens."""


@dataclass(frozen=True)
class Inspection:
    """All that `sftx inspect` shows; `dataclasses.asdict` of it is what `--json` writes."""

    figures: Figures
    rows: tuple[ShownRow, ...]
    chosen: str
    """Which rows these are, in words."""


@dataclass(frozen=True)
class Choice:
    """Which rows are shown."""

    show: Show = "first"
    most: int = 3
    rows: tuple[tuple[str, int], ...] = ()
    """Asked for by name: (path, line or row), or ("", n) for the nth of all; in place of `show`."""


def inspect(look: Look, split: Split, choice: Choice) -> Inspection:
    """Raises SftxError: a row that was asked for is not there, a source cannot be read."""
    data = look.dataset(split)
    shown = _Shown(look, split, data)
    if choice.rows:
        rows, words = _asked_for(look, split, choice.rows, shown), "as asked for"
    elif choice.show == "first":
        rows, words = _first(look, split, choice.most, shown), "the first"
    else:
        rows = _at(look, split, _places(data, choice.show, choice.most), shown)
        words = {"longest": "the longest", "dropped": "dropped or filtered", "cut": "cut or split"}[choice.show]
    return Inspection(figures(look, split), tuple(rows), words)


def sample(look: Look, split: Split, most: int) -> Inspection:
    """Rows for a page: some that are dropped, some cut, the longest, and the rest from the first on."""
    data = look.dataset(split)
    part = max(1, most // 5)
    places: dict[Place, None] = {}
    for show in ("dropped", "cut", "longest"):
        places |= dict.fromkeys(_places(data, show, part))
    shown = _Shown(look, split, data)
    few = data.ledger.num_rows <= most
    rows = [] if few else _at(look, split, list(places)[:most], shown)
    taken = {row.number for row in rows}
    for row in _first(look, split, most, shown):
        if len(rows) < most and row.number not in taken:
            rows.append(row)
    words = "all" if few else "some of those that are dropped, cut or longest, and the first"
    return Inspection(figures(look, split), tuple(sorted(rows, key=lambda row: row.number)), words)


def _places(data: Dataset, show: Show, most: int) -> list[Place]:
    """Where the rows of a kind stand."""
    if show == "longest":
        order = np.argsort(-data.examples.lengths, kind="stable")
        found: dict[Place, None] = {}
        for at in order.tolist():
            if len(found) == most:
                break
            found[_place(data.examples.where(at))] = None
        return list(found)
    actions = ("dropped", "filtered") if show == "dropped" else ("cut", "split")
    return list(dict.fromkeys(_place(e.where) for e in data.ledger.entries if e.action in actions))[:most]


def _place(where: Location) -> Place:
    return where.path, where.number


# --- rows ---------------------------------------------------------------------------------------


def _first(look: Look, split: Split, most: int, shown: _Shown) -> list[ShownRow]:
    rows = []
    for number, (source, where, record) in enumerate(look.records(split), 1):
        if number > most:
            break
        rows.append(shown(number, source, where, record))
    return rows


def _at(look: Look, split: Split, places: Sequence[Place], shown: _Shown) -> list[ShownRow]:
    """The rows that stand at these places, in the order of the places."""
    found: dict[Place, ShownRow] = {}
    wanted = set(places)
    for number, (source, where, record) in enumerate(look.records(split), 1):
        if len(found) == len(wanted):
            break
        if (place := _place(where)) in wanted and place not in found:
            found[place] = shown(number, source, where, record)
    return [found[place] for place in places if place in found]


def _asked_for(look: Look, split: Split, asked: Sequence[tuple[str, int]], shown: _Shown) -> list[ShownRow]:
    found: dict[tuple[str, int], ShownRow] = {}
    number = 0
    for number, (source, where, record) in enumerate(look.records(split), 1):
        for one in asked:
            path, wanted = one
            matches = number == wanted if not path else wanted == where.number and _is_path(path, where.path)
            if matches and one not in found:
                found[one] = shown(number, source, where, record)
        if len(found) == len(set(asked)):
            break
    for path, wanted in asked:
        if (path, wanted) not in found:
            name = f"{path}:{wanted}" if path else str(wanted)
            raise DataError(f"--row {name}: there is no such row among the {number} of data.{split}")
    return [found[one] for one in asked]


def _is_path(typed: str, path: str) -> bool:
    return typed == path or path.endswith(f"/{typed}")


class _Shown:
    """Makes what is shown of one row; what became of it is read from the dataset's own ledger."""

    def __init__(self, look: Look, split: Split, data: Dataset) -> None:
        self._encode = look.prepared.encode if split == "train" else look.prepared.encode_eval
        self._entries: dict[Place, list[Entry]] = {}
        for entry in data.ledger.entries:
            self._entries.setdefault(_place(entry.where), []).append(entry)

    def __call__(self, number: int, source: Source, where: Location, record: Record) -> ShownRow:
        entries = self._entries.get(_place(where), [])
        status: Status = entries[0].action if entries else "kept"
        is_gone = status in ("dropped", "filtered")
        encode, row = self._encode, EncodedRow(where)
        shown: tuple[ShownExample, ...] = ()
        try:
            if not any(map(is_unreadable, entries)):
                row = encode(where, record, source)
                as_it_is = EncodedRow(where) if is_gone else row
                parsed = parse_record(record, EncodedRow(where), encode.parsers, source, encode.config)
                found = examples(encode, parsed, as_it_is)
                names = [one.row_id for one in as_it_is.examples_from_group(0)] or [str(where)] * len(found)
                shown = tuple(ShownExample(name, tuple(one)) for name, one in zip(names, found, strict=True))
        except DataError:
            if not is_gone:
                raise
        return ShownRow(
            number=number,
            where=str(where),
            format=row.format,
            status=status,
            reasons=tuple(dict.fromkeys(_reason(entry) for entry in entries)),
            length=sum(len(one.tokens) for one in shown) if status == "kept" else sum(e.length for e in entries),
            examples=shown,
            record="" if shown else _as_text(record),
        )


def _reason(entry: Entry) -> str:
    kept = f" ({entry.length} tokens, {entry.kept} kept)" if entry.kept else ""
    return f"{entry.reason}{kept}"


def _as_text(record: Record) -> str:
    try:
        text = json.dumps(record, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # nested too deeply, or within itself
        return "(cannot be written as JSON)"
    # A lone surrogate can be written nowhere.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _MOST_OF_A_RECORD else f"{text[:_MOST_OF_A_RECORD]} ..."
