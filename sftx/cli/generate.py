"""`sftx generate`: let a trained model answer the rows of a file."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from sftx.cli.answering import check_model, loaded_model, model_argument, row_options, row_settings, sampling_options
from sftx.errors import ConfigError, OutputError, counted, one_line, printable
from sftx.phases import phase

_MOST_SHOWN: Final = 5


@click.command()
@model_argument
@click.option(
    "--data", "rows", metavar="PATH", multiple=True, required=True,
    help="Rows to answer, in any form that the run reads, or - for JSON lines from standard input; may be repeated.",
)  # fmt: skip
@click.option("--out", metavar="FILE", required=True, help="JSON lines file to write, or - for standard output.")
@click.option("--overwrite", is_flag=True, help="Begin anew instead of going on after the rows that are written.")
@click.option(
    "--batch-size", metavar="N", type=click.IntRange(1), default=16, show_default=True, help="Rows answered at once."
)
@row_options
@sampling_options
def command(
    *,
    model: str,
    rows: tuple[str, ...],
    out: str,
    overwrite: bool,
    batch_size: int,
    plugins: tuple[str, ...],
    without: tuple[str, ...],
    settings: tuple[str, ...],
    format: str | None,
    stop: tuple[str, ...],
    **options: Any,
) -> None:
    """Answer rows with MODEL (as in `sftx chat`), and score the answers with the metrics of its run and those named.

    The last turn of the assistant, if a row ends with one, is what its answer is compared with. A line of FILE has the
    row's place, its messages, the answer, why it ended, and that label. The same command goes on after rows that are
    written already. What is drawn for a row depends on --seed and its number alone.
    """
    check_model(model)
    if "-" in rows and len(rows) > 1:
        raise ConfigError("option '--data': - is all of the rows; leave the other files out")
    with tempfile.TemporaryDirectory() as directory:
        _generate(
            model, list(rows), out, Path(directory), overwrite=overwrite, batch_size=batch_size, stop=stop,
            plugins={"add": plugins, "remove": without, "assignments": row_settings(format, settings)},
            options=options,
        )  # fmt: skip


def _generate(
    model: str,
    rows: list[str],
    out: str,
    directory: Path,
    *,
    overwrite: bool,
    batch_size: int,
    stop: tuple[str, ...],
    plugins: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    from sftx.serving.answers_file import AnswersFile, keep_stdin
    from sftx.serving.run_plugins import plugins_of

    file = None if out == "-" else AnswersFile(Path(out).expanduser())
    if file is not None:
        file.check(overwrite=overwrite)
    stdin = keep_stdin(directory, sys.stdin) if rows == ["-"] else None
    of_run = plugins_of(model, rows=rows if stdin is None else [str(stdin)], **plugins)
    data = of_run.config.data.eval
    of_run.check(data)
    if file is not None:
        file.check_apart(data)
    with phase("reading", "rows"):
        from sftx.serving.answers_file import parsed_rows

        parsed = list(parsed_rows(data, of_run, stdin))
    loaded, sampling = loaded_model(model, **options)

    from sftx.serving.answers import Answerer, asked_of, identity, summary_of
    from sftx.serving.answers_file import write_line

    answerer = Answerer(loaded, sampling, stop, batch_size)
    with phase("encoding", "rows", unit="rows") as progress:
        asked = [asked_of(one, row, loaded) for row, one in progress.counted(parsed)]
    described = identity(answerer, data, of_run, is_stdin=stdin is not None)
    stream, lines = (sys.stdout, []) if file is None else file.begin(described, overwrite=overwrite)
    if lines:
        click.echo(f"{out}: {counted(len(lines), 'row')} of {len(asked)} written before", err=True)
    with phase("answering", "rows", total=len(asked), unit="rows", done=len(lines)) as progress:
        for line in progress.counted(answerer.lines(asked, len(lines))):
            try:
                write_line(stream, line)
            except OSError as error:
                raise OutputError(f"--out {out}: cannot be written: {one_line(error)}") from error
            lines.append(line)
    summary = summary_of(asked, lines, of_run)
    if file is not None:
        stream.close()
        file.finish(described, summary)
    _print_summary(summary, lines, out)


def _print_summary(summary: Mapping[str, Any], lines: list[dict[str, Any]], out: str) -> None:
    if failed := [line for line in lines if "error" in line]:
        for line in failed[:_MOST_SHOWN]:
            click.echo(printable(f"{line['id']}: not answered: {line['error']}"), err=True)
        if len(failed) > _MOST_SHOWN:
            click.echo(f"{len(failed) - _MOST_SHOWN} more rows are not answered; their lines say why", err=True)
    cut = f", {summary['cut']} of them cut at --max-new-tokens" if summary["cut"] else ""
    told = [f"{out}: {summary['answered']} of {counted(summary['rows'], 'row')} answered{cut}"]
    told += [f"{name} {value:.5g} of {counted(summary['scored'], 'row')}" for name, value in summary["scores"].items()]
    for text in told:
        click.echo(printable(text), err=out == "-")
