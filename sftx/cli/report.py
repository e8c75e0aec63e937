"""`sftx report`: write an HTML page about one run or several."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import click

from sftx.cli.run_argument import RunPath
from sftx.errors import ConfigError, OutputError, one_line, printable
from sftx.phases import phase

log = logging.getLogger(__name__)

_MARK: Final = b"sftx report"
"""Every file that this command writes holds this text near its beginning, and may therefore be replaced by it."""


@click.command()
@click.argument("runs", metavar="RUN_DIR...", nargs=-1, required=True, type=RunPath(result=False))
@click.option(
    "-o", "--output", metavar="DIR|FILE.html", type=click.Path(path_type=Path),
    help="Where to write the page, with the picture beside it.  [default: report.html in the run's directory; for "
    "several runs, in the current directory]",
)  # fmt: skip
def command(*, runs: tuple[Path, ...], output: Path | None) -> None:
    """Write report.html and loss.png of a run: curves, loss masks, answers before and after training, versions.

    For two or more RUN_DIRs, the page shows their curves together and what differs between the runs. A run may still
    be running. The page is complete in one file and fetches nothing; loss.png needs matplotlib.
    """
    from sftx.inspection.run_report.run_record import read_run
    from sftx.inspection.run_report.write_report import PAGE, PICTURE, notes, write
    from sftx.stores import is_copy

    if len({os.path.realpath(run) for run in runs}) < len(runs):
        raise click.UsageError("one run is named twice; name each once")
    if output is None:
        page = runs[0] / PAGE if len(runs) == 1 and not is_copy(runs[0]) else Path(PAGE)
    else:
        page = output if output.suffix == ".html" and not output.is_dir() else output / PAGE
    picture = page.with_name(PICTURE if page.name == PAGE else f"{page.stem}-{PICTURE}")
    replaced = [path for path in (page, picture) if _is_replaceable(path)]
    with phase("reading", "runs"):
        records = [read_run(run) for run in runs]
    for number, note in notes(records):
        log.warning("%s: %s", runs[number], note)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"{page.parent}: is no directory, and cannot be made one; name a directory with --output, or a file that "
            "ends in .html"
        ) from None
    except OSError as error:
        raise OutputError(f"{page.parent}: cannot be created: {one_line(error)}") from error
    with phase("writing", "the page"):
        written = write(records, page, picture)
    for path in written:
        click.echo(f"wrote {printable(str(path))}" + (", in place of the one before" if path in replaced else ""))


def _is_replaceable(path: Path) -> bool:
    """Return whether there is a report that may be replaced, False when there is nothing.

    Raises ConfigError for a file that is not a report: a file of another origin is never overwritten.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
    if _MARK not in head:
        raise ConfigError(f"{path}: holds something else and is not overwritten; choose another place with --output")
    return True
