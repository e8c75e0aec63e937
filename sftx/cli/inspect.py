"""`sftx inspect`: what each token is, which are trained, what was dropped or cut."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from sftx.cli.options import run_options
from sftx.config import loading
from sftx.errors import OutputError, one_line

if TYPE_CHECKING:
    from sftx.inspection.token_report.inspect import Choice, Show

_NUMBER: Final = re.compile(r"[1-9][0-9]{0,15}")
_FILE = click.Path(dir_okay=False, allow_dash=True)


def _places(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """`PATH:LINE`, or a number of all rows, as (path, number)."""
    places = []
    for value in values:
        path, _, number = value.rpartition(":")
        if not _NUMBER.fullmatch(number) or value.startswith(":"):
            raise click.BadParameter(f"got {value!r}; expected PATH:LINE, or the number of a row counted from 1")
        places.append((path, int(number)))
    return tuple(places)


@click.command()
@run_options("data")
@click.option("--rows", "most", metavar="N", type=click.IntRange(min=1), help="Rows to show.  [default: 3]")
@click.option(
    "--row", "places", metavar="PATH:LINE|N", multiple=True, callback=_places,
    help="Show this row, by its place or its number; repeat for more.",
)  # fmt: skip
@click.option("--show", type=click.Choice(["longest", "dropped", "cut"]), help="Show these rows, not the first.")
@click.option(
    "--split", type=click.Choice(["train", "eval"]), default="train", show_default=True, help="Which data to look at."
)
@click.option("--ids", is_flag=True, help="Show the id of each token.")
@click.option("--html", "html_path", metavar="FILE", type=_FILE, help="Write a page, complete in one file.")
@click.option(
    "--max-rows", metavar="N", type=click.IntRange(min=1), default=200, show_default=True, help="Rows in the page."
)
@click.option("--json", "json_path", metavar="FILE|-", type=_FILE, help="Write all of it as one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    file: Path | None,
    loaded: loading.LoadedConfig,
    most: int | None,
    places: tuple[tuple[str, int], ...],
    show: Show | None,
    split: Literal["train", "eval"],
    ids: bool,
    html_path: str | None,
    max_rows: int,
    json_path: str | None,
) -> None:
    """Show what a run would train on: every token, and why it is trained or not.

    RUN_FILE and the options are those of `sftx run`; no model weights are read. Rows that would stop a run are shown
    with the reason.
    """
    data = loaded.config.data
    _check_outputs(html_path, json_path, [file, *(Path(source.path) for source in (*data.train, *data.eval))])
    if places and (show is not None or most is not None):
        raise click.UsageError("--row names the rows that are shown; leave --rows and --show out")
    if ctx.get_parameter_source("max_rows") == click.core.ParameterSource.COMMANDLINE and html_path is None:
        raise click.UsageError("--max-rows has no meaning without --html")
    if split == "eval" and not loaded.config.data.eval:
        raise click.UsageError("--split eval: the run has no held-out rows; give them with --eval-data")
    _inspect(loaded, split, _choice(places, show, most), ids=ids, html=html_path, max_rows=max_rows, json=json_path)


def _check_outputs(html: str | None, json: str | None, inputs: Iterable[Path | None]) -> None:
    """Raises UsageError for an output that would lose something."""
    if html is not None and html == json:
        raise click.UsageError(f"--html and --json are both {html}; give each a place of its own")
    taken = {path.expanduser().resolve() for path in inputs if path is not None}
    for option, suffix, output in (("--html", ".html", html), ("--json", ".json", json)):
        if output is None or output == "-":
            continue
        path = Path(output)
        if path.suffix != suffix:
            raise click.UsageError(f"{option} {output}: name a file that ends in {suffix}")
        if path.resolve() in taken or (path.exists() and _MARK not in _head(path)):
            raise click.UsageError(f"{option} {output}: holds something else, which is not written over")


_MARK: Final = b"sftx inspect"
"""Stands at the beginning of what this command writes, and lets it be written again."""


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _choice(places: tuple[tuple[str, int], ...], show: Show | None, most: int | None) -> Choice:
    # Imported here and below: what stands above is checked before torch and transformers are loaded, for seconds.
    from sftx.inspection.token_report.inspect import Choice

    return Choice(show or "first", most or 3, places)


def _inspect(
    loaded: loading.LoadedConfig,
    split: Literal["train", "eval"],
    choice: Choice,
    *,
    ids: bool,
    html: str | None,
    max_rows: int,
    json: str | None,
) -> None:
    from rich.console import Console

    from sftx.inspection.dataset_view import look
    from sftx.inspection.token_report import inspect, terminal

    looked = look(loaded)
    asked = inspect.inspect(looked, split, choice)
    if json is not None:
        _write(json, as_json(asked))
    if html is not None:
        from sftx.inspection.token_report.html import page

        chosen = asked if choice.rows else inspect.sample(looked, split, max_rows)
        _write(html, page(chosen))
        if html != "-":
            click.echo(f"wrote {html} ({len(chosen.rows):,} of {chosen.figures.num_rows:,} rows)", err=True)
    if json is None and html is None:
        console = Console(highlight=False)
        terminal.show(asked, console if console.is_terminal else Console(highlight=False, width=120), ids=ids)


def as_json(report: Any) -> str:
    """A dataclass of the reports as one JSON object, with the names of its fields."""
    values = {"made_by": _MARK.decode()} | dataclasses.asdict(report)
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"


def _write(path: str, text: str) -> None:
    """Raises OutputError."""
    if path == "-":
        click.echo(text.encode(errors="backslashreplace"), nl=False)
        return
    try:
        # A name of a file that is no UTF-8 is shown with escapes.
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
