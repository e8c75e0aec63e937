"""Looks at the rows of some data: how many there are, which parsers read them, and what can be learned from them.

Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from sftx.assembly.registry import Assembly, activate
from sftx.assembly.stages.data_stages import ParserStage
from sftx.config import loading
from sftx.config.options import DataConfig, RunConfig, Source
from sftx.data import sources
from sftx.data.row_encoder import EncodedRow, parse_record
from sftx.errors import ConfigError, DataError, counted, one_line
from sftx.phases import phase
from sftx.types import Conversation, Location, Parsed, PlainText, Record

_MOST_COUNTED: Final = 200_000
_SAMPLE: Final = 400
"""The rows that are parsed and encoded are at most twice as many."""
_PREFERENCE: Final = "preference"
_MOST_INVALID: Final = 0.05
"""The largest share of rows without a format that a run may drop: `data.max_dropped`."""

Kind: TypeAlias = Literal["chat", "text", "pairs", "labelled", "tokens"]
Objective: TypeAlias = Literal["sft", "dpo", "kto", "grpo"]

OBJECTIVES: Final[dict[Kind, tuple[Objective, ...]]] = {
    "chat": ("sft", "grpo"),
    "text": ("sft",),
    "tokens": ("sft",),
    "pairs": ("dpo",),
    "labelled": ("kto",),
}
"""What data of a kind can be trained on for, the usual one first."""


@dataclass(frozen=True)
class SampledRows:
    """The rows that were looked at, and what is known of the data."""

    paths: tuple[str, ...]
    num_rows: int
    is_complete: bool
    """False when counting stopped before the end."""
    formats: tuple[str, ...]
    kind: Kind
    parsed: tuple[tuple[Location, Sequence[Parsed]], ...]
    """Rows that are spread evenly over the data, as their parsers read them."""
    num_invalid: int
    """The rows of the sample that no parser reads."""
    problem: str
    """Why the first of them cannot be read."""

    @property
    def count(self) -> str:
        return f"{self.num_rows:,} {'row' if self.num_rows == 1 else 'rows'}" + ("" if self.is_complete else " or more")


def look_at(paths: Sequence[str]) -> SampledRows:
    """Read and parse the data. Raises SftxError: a file that is not there, or whose rows no parser reads."""
    assignments = [("data.train", list(paths), f"--data {' '.join(paths)}")]
    loaded = loading.load(None, add=[_PREFERENCE], assignments=assignments)
    assembly = activate(loaded)
    config = loaded.config
    sources.check_data_config(config, assembly.row_sources)
    with phase("reading", "rows", unit="rows") as progress:
        num_rows, sample = _sample(config, assembly, progress.counted)
    parsers = assembly.parsers()
    read: list[tuple[Location, Sequence[Parsed]]] = []
    formats: Counter[str] = Counter()
    problems: list[str] = []
    for where, record, source in sample:
        row = EncodedRow(where)
        try:
            read.append((where, _parse(record, row, parsers, source, config.data)))
            formats[row.format] += 1
        except DataError as error:
            problems.append(one_line(error, max_chars=1000))
    if len(problems) > _MOST_INVALID * len(sample):
        share = "" if len(problems) == len(sample) else f" ({len(problems)} of {len(sample)} rows that were tried)"
        raise DataError(f"no format reads this row{share}; tried were {', '.join(parsers)}: {problems[0]}")
    return SampledRows(
        paths=tuple(paths),
        num_rows=num_rows,
        is_complete=num_rows < _MOST_COUNTED,
        formats=tuple(name for name, _ in formats.most_common()),
        kind=_kind(paths, read),
        parsed=tuple(read),
        num_invalid=len(problems),
        problem=problems[0] if problems else "",
    )


def _sample(
    config: RunConfig, assembly: Assembly, counting: object
) -> tuple[int, list[tuple[Location, Record, Source]]]:
    """Count the rows and return some of them, evenly spread."""
    assert callable(counting)
    kept: list[tuple[Location, Record, Source]] = []
    stride, num = 1, 0
    for row in counting(_rows(config, assembly)):
        if num % stride == 0:
            kept.append(row)
        num += 1
        if len(kept) > 2 * _SAMPLE:
            kept, stride = kept[::2], 2 * stride
        if num == _MOST_COUNTED:
            break
    return num, kept


def _rows(config: RunConfig, assembly: Assembly) -> Iterator[tuple[Location, Record, Source]]:
    for source in config.data.train:
        for where, record in sources.read(source, assembly.row_sources, encoding=config.data.encoding):
            yield where, record, source


def _parse(
    record: Record, row: EncodedRow, parsers: dict[str, ParserStage], source: Source, data: DataConfig
) -> Sequence[Parsed]:
    """Parse as a preference record where that works, else with the first of the other parsers that accepts it."""
    preference = parsers[_PREFERENCE]
    others = {name: parser for name, parser in parsers.items() if name != _PREFERENCE}
    if not source.columns and preference.accepts(record):
        try:
            parsed = preference.parse(record, row.where)
        except DataError:
            # `instruction` and `output` are also fields of a plain answer.
            if not any(parser.accepts(record) for name, parser in others.items() if name != "hh-rlhf"):
                raise
        else:
            row.format = _PREFERENCE
            return parsed
    return parse_record(record, row, others, source, data)


def _kind(paths: Sequence[str], read: Sequence[tuple[Location, Sequence[Parsed]]]) -> Kind:
    """Return what the rows are. Raises ConfigError when they are of several kinds."""
    kinds: dict[Kind, Location] = {}
    for where, parsed in read:
        if not parsed:
            continue
        if any(one.extras.get(_PREFERENCE) for one in parsed):
            kind: Kind = "pairs" if len(parsed) > 1 else "labelled"
        elif isinstance(parsed[0], Conversation):
            kind = "chat"
        else:
            kind = "text" if isinstance(parsed[0], PlainText) else "tokens"
        kinds.setdefault(kind, where)
    if len(kinds) > 1:
        found = "; ".join(f"{where}: {_IN_WORDS[kind]}" for kind, where in kinds.items())
        raise ConfigError(f"--data {' '.join(paths)}: its rows are of several kinds ({found}); give one kind a run")
    if not kinds:
        raise DataError(f"{' '.join(paths)}: no row of it has anything to train on")
    return next(iter(kinds))


_IN_WORDS: Final[dict[Kind, str]] = {
    "chat": "conversations",
    "text": "plain text",
    "tokens": "token ids",
    "pairs": "pairs of a better and a worse answer",
    "labelled": "answers that are labelled good or bad",
}


def in_words(rows: SampledRows) -> str:
    """Return what the data is, in one line."""
    formats = " and ".join(rows.formats)
    invalid = f"; {counted(rows.num_invalid, 'row')} of {len(rows.parsed) + rows.num_invalid} cannot be read"
    return f"{rows.count}: {_IN_WORDS[rows.kind]} (format {formats})" + (invalid if rows.num_invalid else "")
