"""`sftx data`: what a run would read, in other forms."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click

from sftx.cli.options import run_options
from sftx.config import loading, options
from sftx.errors import ConfigError, OutputError, one_line, printable

_SUFFIXES = (".jsonl", ".ndjson")


@click.group()
def command() -> None:
    """Convert the data of a run."""


@command.command()
@run_options("data")
@click.option("--output", metavar="FILE", required=True, help="JSON lines file to write, or - for the terminal.")
def export(file: Path | None, loaded: loading.Loaded, output: str) -> None:
    """Write the training rows of RUN_FILE or the options, merged, filtered and converted, as messages JSON lines.

    Each row is written once, whatever the weight of its source. Filters that count tokens do not apply; nor does
    max_length.
    """
    from sftx.assembly.registry import activate
    from sftx.data import sources
    from sftx.data.export import export as lines_of
    from sftx.data.ledger import Ledger
    from sftx.data.pipeline import check_formats

    data = loaded.config.data
    if not data.train:
        raise ConfigError("option 'data.train': no data to export; give a file with --data")
    for source in data.train:
        sources.check(source)
    if output != "-":
        _check_output(output)
    parsers = activate(loaded).parsers()
    check_formats(data, loaded.origins, parsers)
    ledger = Ledger()
    lines = lines_of(data.train, data, parsers, ledger)
    if output == "-":
        sys.stdout.buffer.writelines(f"{line}\n".encode() for line in lines)
        sys.stdout.flush()
    else:
        _write(lines, Path(output).expanduser())
    for line in (*ledger.summary(), *_not_applied(data)):
        click.echo(printable(line), err=True)
    gone = sum(entry.action in ("dropped", "filtered") for entry in ledger.entries)
    click.echo(printable(f"{ledger.num_rows - gone} of {ledger.num_rows} rows written to {output}"), err=True)


def _not_applied(data: options.DataConfig) -> Iterable[str]:
    for filters in dict.fromkeys(source.filters or data.filters for source in data.train):
        if filters.min_length or filters.max_length is not None:
            yield "filters.min_length and max_length count tokens, which an export has none of: not applied"
            return


def _check_output(output: str) -> None:
    try:
        path = Path(output).expanduser()
    except RuntimeError as error:
        raise OutputError(f"--output {output}: {one_line(error)}") from None
    if path.suffix not in _SUFFIXES:
        raise OutputError(
            f"--output {output}: JSON lines are written; name a file that ends in {' or '.join(_SUFFIXES)}"
        )
    if path.exists() or path.is_symlink():
        raise OutputError(f"--output {output}: is there already and never written over; choose another name")


def _write(lines: Iterable[str], path: Path) -> None:
    """Writes a file beside `path`, which then takes its name: it is there whole, or not at all."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("x", encoding="utf-8", newline="\n") as stream:
            stream.writelines(line + "\n" for line in lines)
        _check_output(str(path))  # somebody may have written it meanwhile
        part.rename(path)
    except OSError as error:
        raise OutputError(f"--output {path}: cannot be written: {one_line(error)}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
