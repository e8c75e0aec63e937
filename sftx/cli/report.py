"""`sftx report`: what came of a run, or of several, as a page to look at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from sftx.errors import ConfigError, OutputError, one_line, printable

log = logging.getLogger(__name__)

_MARK: Final = b"sftx report"
"""Stands in the head of what this command writes, and lets it be written again."""


@click.command()
@click.argument("runs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(file_okay=True, path_type=Path))
@click.option(
    "-o", "--output", metavar="DIR|FILE.html", type=click.Path(path_type=Path),
    help="Where the page goes, with the picture beside it.  [default: report.html in the run's directory; of several "
    "runs, here]",
)  # fmt: skip
def command(*, runs: tuple[Path, ...], output: Path | None) -> None:
    """Write report.html and loss.png of a run: curves, masks, answers before and after, what it was made of.

    Of two or more RUN_DIRs the curves lie over one another, with what differs between the runs. A run may still be
    under way. The page is complete in one file and fetches nothing; loss.png needs matplotlib.
    """
    from sftx.inspection.run_report.run_record import read
    from sftx.inspection.run_report.run_report import PAGE, PICTURE, notes, write

    if len({run.resolve() for run in runs}) < len(runs):
        raise click.UsageError("one run is named twice; name each once")
    page = _page(runs, output, PAGE)
    picture = page.with_name(PICTURE if page.name == PAGE else f"{page.stem}-{PICTURE}")
    for path in (page, picture):
        _check_free(path)
    records = [read(run) for run in runs]
    for n, note in notes(records):
        log.warning("%s: %s", runs[n], note)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{page.parent}: cannot be made: {one_line(error)}") from error
    for path in write(records, page, picture):
        click.echo(f"wrote {printable(str(path))}")


def _page(runs: Sequence[Path], output: Path | None, name: str) -> Path:
    if output is None:
        return runs[0] / name if len(runs) == 1 else Path(name)
    return output if output.suffix == ".html" and not output.is_dir() else output / name


def _check_free(path: Path) -> None:
    """Raises ConfigError for a file that is no report: what somebody else wrote is not written over."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
    if _MARK not in head:
        raise ConfigError(f"{path}: holds something else, which is not written over; choose a place with --output")
