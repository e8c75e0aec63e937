"""`sftx inspect`: show each token of a run's rows, which tokens are trained, and which rows were dropped or cut."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from sftx.cli.options import RunCommand, run_options
from sftx.config import loading
from sftx.errors import OutputError, counted, one_line
from sftx.phases import phase

if TYPE_CHECKING:
    from sftx.inspection.token_report.explained_rows import Show

_NUMBER: Final = re.compile(r"[1-9][0-9]{0,15}")
_FILE = click.Path(dir_okay=False, allow_dash=True)
_MARK: Final = b"sftx inspect"
"""Every file that this command writes begins with this text, and may therefore be replaced by it."""


def _parse_places(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Turn `PATH:LINE` into (path, line), and the number of a row into ("", number)."""
    places = []
    for value in values:
        path, _, number = value.rpartition(":")
        if not _NUMBER.fullmatch(number) or value.startswith(":"):
            raise click.BadParameter(f"got {value!r}; expected PATH:LINE, or the number of a row counted from 1")
        places.append((path, int(number)))
    return tuple(places)


@click.command(cls=RunCommand)
@run_options("data")
@click.option("--rows", "max_rows", metavar="N", type=click.IntRange(min=0), help="Rows to show.  [default: 3]")
@click.option(
    "--row", "places", metavar="PATH:LINE|N", multiple=True, callback=_parse_places,
    help="Show this row, by its place or its number; repeat for more.",
)  # fmt: skip
@click.option("--show", type=click.Choice(["longest", "dropped", "cut"]), help="Show these rows, not the first.")
@click.option(
    "--split", type=click.Choice(["train", "eval"]), default="train", show_default=True, help="Which data to look at."
)
@click.option("--ids", is_flag=True, help="Show the id of each token.")
@click.option("--html", "html_path", metavar="FILE", type=_FILE, help="Write an HTML page, complete in one file.")
@click.option(
    "--max-rows", "max_page_rows", metavar="N", type=click.IntRange(min=1), default=200, show_default=True,
    help="Rows in the page.",
)  # fmt: skip
@click.option("--json", "json_path", metavar="FILE|-", type=_FILE, help="Write the report as one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    file: Path | None,
    loaded: loading.LoadedConfig,
    max_rows: int | None,
    places: tuple[tuple[str, int], ...],
    show: Show | None,
    split: Literal["train", "eval"],
    ids: bool,
    html_path: str | None,
    max_page_rows: int,
    json_path: str | None,
) -> None:
    """Show what a run would train on: every token, and the reason why it is trained or not.

    RUN_FILE and the options are those of `sftx run`; no model weights are read. Rows that would stop a run are shown
    with the reason.
    """
    data = loaded.config.data
    _check_outputs(html_path, json_path, [file, *(Path(source.path) for source in (*data.train, *data.eval))])
    if places and (show is not None or max_rows is not None):
        raise click.UsageError("--row names the rows that are shown; leave --rows and --show out")
    if ctx.get_parameter_source("max_page_rows") == click.core.ParameterSource.COMMANDLINE and html_path is None:
        raise click.UsageError("--max-rows has no meaning without --html")
    if split == "eval" and not data.has_eval:
        raise click.UsageError(
            "--split eval: the run has no held-out rows; give them with --eval-data, or hold some out with "
            "--eval-fraction"
        )

    # These import torch and transformers, which takes seconds: only after the options are checked.
    with phase("importing", "torch and transformers"):
        from rich.console import Console

        from sftx.inspection.dataset_view import view_dataset
        from sftx.inspection.token_report.explained_rows import RowSelection, inspect_rows, sample_rows
        from sftx.inspection.token_report.terminal import print_report
        from sftx.inspection.token_report.token_page import token_page

    view = view_dataset(loaded)
    with phase("explaining", "rows"):
        selection = RowSelection(show or "first", 3 if max_rows is None else max_rows, places)
        report = inspect_rows(view, split, selection)
    if json_path is not None:
        _write(json_path, report_json(report))
    if html_path is not None:
        with phase("writing", "the page"):
            page_report = report if places else sample_rows(view, split, max_page_rows)
            page = token_page(page_report)
        _write(html_path, page)
        if html_path != "-":
            count = f"{len(page_report.rows):,} of {counted(page_report.figures.num_rows, 'row')}"
            click.echo(f"wrote {html_path} ({count})", err=True)
    if json_path is None and html_path is None:
        console = Console(highlight=False)
        print_report(report, console if console.is_terminal else Console(highlight=False, width=120), ids=ids)


def _check_outputs(html: str | None, json: str | None, inputs: list[Path | None]) -> None:
    """Raises UsageError for an output that would replace an input or any file that this command did not write."""
    if html is not None and html == json:
        raise click.UsageError(f"--html and --json are both {html}; give each its own file")
    input_paths = {_real_path(path) for path in inputs if path is not None}
    for option, suffix, output in (("--html", ".html", html), ("--json", ".json", json)):
        if output is None or output == "-":
            continue
        path = Path(output)
        if path.suffix != suffix:
            raise click.UsageError(f"{option} {output}: name a file that ends in {suffix}")
        try:
            with path.open("rb") as stream:
                is_foreign = _MARK not in stream.read(4096)
        except OSError:
            is_foreign = path.exists()
        if _real_path(path) in input_paths or is_foreign:
            raise click.UsageError(f"{option} {output}: holds something else and is not overwritten")


def _real_path(path: Path) -> str:
    """Return the path without links; unlike Path.resolve, also of a link that leads back to itself."""
    try:
        return os.path.realpath(os.path.expanduser(path))
    except ValueError:  # a path with a NUL byte, which the check of the data names
        return str(path)


def report_json(report: Any, *, made_by: str = _MARK.decode()) -> str:
    """Return a report, which is a dataclass, as one JSON object with the names of its fields."""
    values = {"made_by": made_by} | dataclasses.asdict(report)
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"


def _write(path: str, text: str) -> None:
    """Write to a file, or to standard output for `-`. Raises OutputError."""
    if path == "-":
        click.echo(text.encode(errors="backslashreplace"), nl=False)
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # A file name that is not UTF-8 is written with escapes.
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
