"""`sftx doctor`: find problems of a run before it trains."""

from __future__ import annotations

from pathlib import Path

import click

from sftx.cli.options import RunCommand, run_options
from sftx.config import loading
from sftx.phases import phase


@click.command(cls=RunCommand)
@run_options("data")
@click.option("--json", "as_json", is_flag=True, help="Write the findings as one JSON object.")
@click.pass_context
def command(ctx: click.Context, *, file: Path | None, loaded: loading.LoadedConfig, as_json: bool) -> None:
    """Find problems of a run before it trains: in its rows, template and tokenizer, and in the model's configuration.

    RUN_FILE and the options are those of `sftx run`; no model weights are read. Exits with 1 when there is an error
    among the findings.
    """
    del file
    # These import torch and transformers, which takes seconds: only after the options are checked.
    with phase("importing", "torch and transformers"):
        from rich.console import Console

        from sftx.cli.inspect import report_json
        from sftx.inspection.dataset_view import view_dataset
        from sftx.inspection.diagnosis.diagnose import diagnose, print_diagnosis

    view = view_dataset(loaded)
    with phase("checking", "data and model"):
        diagnosis = diagnose(view)
    if as_json:
        text = report_json(diagnosis, made_by="sftx doctor")
        click.echo(text.encode(errors="backslashreplace"), nl=False)
    else:
        console = Console(highlight=False)
        print_diagnosis(diagnosis, console if console.is_terminal else Console(highlight=False, width=120))
    ctx.exit(int(diagnosis.failed))
