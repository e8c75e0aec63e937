"""`sftx upload` copies a run directory to a store: the rest of one that could not be uploaded, or all of it."""

from __future__ import annotations

from pathlib import Path

import click

from sftx.errors import ConfigError, OutputError, printable


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("address", metavar="[ADDRESS]", required=False)
def command(run: Path, address: str | None) -> None:
    """Copy the directory RUN to ADDRESS, such as s3://bucket/runs/x; by default to that which the run was given.

    Checkpoints that are complete there are left as they are, and nothing is removed. `sftx push` uploads the result
    alone, to the Hugging Face hub.
    """
    from sftx.checkpoint import layout
    from sftx.checkpoint.remote_runs import output_place
    from sftx.checkpoint.uploading import upload_run
    from sftx.config.loading import load
    from sftx.stores import is_address

    if not (run / layout.RUN).is_file():
        raise OutputError(f"{run}: is no run directory, which has a {layout.RUN}")
    if address is None and (address := output_place(load(run / layout.RUN).config).address) is None:
        raise ConfigError(f"{run}: its run was given no address to upload to; name one, such as s3://bucket/runs/x")
    if not is_address(address):
        raise ConfigError(f"{address}: is no address in a store, such as s3://bucket/runs/x")
    upload_run(run, address)
    click.echo(printable(f"uploaded {run} to {address}"))
