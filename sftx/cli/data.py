"""The command `sftx data` converts the data of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sftx import atomic_files
from sftx.cli.options import RunCommand, run_options
from sftx.config import loading
from sftx.errors import ConfigError, OutputError, counted, one_line, printable
from sftx.phases import phase

_SUFFIXES = (".jsonl", ".ndjson")


@click.group()
def command() -> None:
    """Convert the data of a run."""


@command.command(cls=RunCommand)
@run_options("data")
@click.option("--output", metavar="FILE", required=True, help="JSON lines file to write, or - for the terminal.")
def export(file: Path | None, loaded: loading.LoadedConfig, output: str) -> None:
    """Write the training rows of RUN_FILE or the options, merged, filtered and converted, as messages JSON lines.

    Each row is written once, whatever the weight of its source. Filters that count tokens do not apply; nor does
    max_length.
    """
    from sftx.assembly.registry import activate
    from sftx.data import sources

    with phase("importing", "numpy and pyarrow"):
        from sftx.data.export import export_lines
        from sftx.data.ledger import Ledger
        from sftx.data.pipeline import check_formats

    data = loaded.config.data
    if not data.train:
        raise ConfigError("option 'data.train': no data to export; give a file with --data")
    sources.check_eval_fraction(data)
    if output != "-":
        _check_output(output)
    assembly = activate(loaded)
    for source in data.train:
        sources.check(source, assembly.row_sources)
    parsers = assembly.parsers()
    check_formats(data, loaded.origins, parsers)
    ledger = Ledger()
    lines = export_lines(data.train, data, parsers, ledger, assembly.row_sources)
    if output == "-":
        if sys.stdout is None:
            raise OutputError("--output -: standard output is closed")
        sys.stdout.buffer.writelines(f"{line}\n".encode() for line in lines)
        sys.stdout.flush()
    else:
        path = Path(output).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--output {output}: cannot be written: {one_line(error)}") from error
        exporting = phase("exporting", "rows", unit="rows")
        with exporting as progress, atomic_files.open_text(path, overwrite=False) as stream:
            stream.writelines(f"{line}\n" for line in progress.counted(lines))
    for line in ledger.summary():
        click.echo(printable(line), err=True)
    filters = [source.filters or data.filters for source in data.train]
    if any(one.min_length or one.max_length is not None for one in filters):
        click.echo("filters.min_length and max_length count tokens and are not applied to an export", err=True)
    num_written = f"{ledger.num_rows - len(ledger.entries):,} of {counted(ledger.num_rows, 'row')}"
    click.echo(printable(f"{num_written} written to {output}"), err=True)


def _check_output(output: str) -> None:
    """Raise OutputError when the file exists or its suffix is not that of JSON lines."""
    try:
        path = Path(output).expanduser()
    except RuntimeError as error:
        raise OutputError(f"--output {output}: {one_line(error)}") from None
    if path.suffix not in _SUFFIXES:
        raise OutputError(
            f"--output {output}: JSON lines are written; name a file that ends in {' or '.join(_SUFFIXES)}"
        )
    if path.exists() or path.is_symlink():
        raise OutputError(f"--output {output}: exists already and is never overwritten; choose another name")
