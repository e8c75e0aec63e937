"""`sftx doctor`: what is wrong with a run, before it trains."""

from __future__ import annotations

from pathlib import Path

import click

from sftx.cli.options import run_options
from sftx.config import loading


@click.command()
@run_options("data")
@click.option("--json", "as_json", is_flag=True, help="Write the findings as one JSON object.")
@click.pass_context
def command(ctx: click.Context, *, file: Path | None, loaded: loading.LoadedConfig, as_json: bool) -> None:
    """Look for what is wrong with a run: its rows, its template, its tokenizer and what is known of its model.

    RUN_FILE and the options are those of `sftx run`; no model weights are read. Ends with 1 when there is an error
    among the findings.
    """
    del file
    # torch and transformers are loaded here, for seconds: the options are checked by now.
    from rich.console import Console

    from sftx.cli import inspect
    from sftx.inspection.dataset_view import look
    from sftx.inspection.diagnosis import doctor

    diagnosis = doctor.diagnose(look(loaded))
    if as_json:
        click.echo(inspect.as_json(diagnosis), nl=False)
    else:
        console = Console(highlight=False)
        doctor.show(diagnosis, console if console.is_terminal else Console(highlight=False, width=120))
    ctx.exit(int(diagnosis.failed))
