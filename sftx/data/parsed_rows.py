"""Read and parse the rows of sources without a tokenizer, as far as a run would train on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sftx.assembly.stages.data_stages import ParserStage
from sftx.config.options import DataConfig, Source
from sftx.data import sources
from sftx.data.row_encoder import EncodedRow, filtered_by_turns, mark_trained, parse_record, why_nothing_trained
from sftx.data.sources import NO_PLUGINS, RowSources
from sftx.errors import DataError, SftxError
from sftx.types import Parsed, Record


@dataclass(frozen=True)
class ParsedRow:
    """A row whose turns are marked as trained or not, or the ledger's entry of why a run would leave it out."""

    source: int
    """Number of the source."""
    index: int
    """How many rows of the source come before it."""
    record: Record
    row: EncodedRow
    """Without examples: only its place, format and entries."""
    parsed: Sequence[Parsed]
    """Empty when the row is left out."""


def parse_rows(
    data_sources: Sequence[Source],
    config: DataConfig,
    parsers: Mapping[str, ParserStage],
    row_sources: RowSources = NO_PLUGINS,
) -> Iterator[ParsedRow]:
    """Yield every row of the sources, in order.

    Options that count tokens have no effect. Raises DataError for a row that cannot be read, unless `invalid_rows`
    drops it.
    """
    for number, source in enumerate(data_sources):
        filters = source.filters or config.filters
        for index, (where, record) in enumerate(sources.read(source, row_sources, encoding=config.encoding)):
            row = EncodedRow(where)
            parsed: Sequence[Parsed] = ()
            try:
                parsed = parse_record(record, row, parsers, source, config)
            except SftxError as error:
                if not (isinstance(error, DataError) and config.invalid_rows == "drop"):
                    if str(where) not in str(error):
                        error.args = (f"{where}: {error}",)
                    raise
                row.drop(str(error).removeprefix(f"{where}: "))
            else:
                if reason := filtered_by_turns(parsed, filters):
                    row.drop(reason, action="filtered")
                else:
                    parsed = [mark_trained(one, config) for one in parsed]
                    if reason := why_nothing_trained(parsed, config):
                        row.drop(reason)
            yield ParsedRow(number, index, record, row, () if row.entries else parsed)
