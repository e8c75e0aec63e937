"""`sftx run`: every option of a run file, under its own name, on the command line."""

from __future__ import annotations

from pathlib import Path

import click

from sftx import config, loading
from sftx.cli.options import run_options


@click.command()
@run_options("data", "train", "generation")
@click.option("--resume", is_flag=True, help="Go on with this run where it was interrupted; begin it if it was not.")
def command(file: Path | None, loaded: loading.Loaded, *, resume: bool) -> None:
    """Fine-tune a model as RUN_FILE (YAML) and the options say; the options win.

    With neither a run file nor data, it trains the embedded model on the embedded data.
    """
    from sftx.run import run

    run(loaded, name=_name(file, loaded.config), resume=resume)


def _name(file: Path | None, loaded: config.RunConfig) -> str:
    """What the default output directory is called after: the run file, or the first file of data."""
    source = str(file) if file is not None else next((source.path for source in loaded.data.train), "run")
    if source.startswith("sftx:"):
        return "demo"
    return Path(source).name.split(".")[0] or "run"
