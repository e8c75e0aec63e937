"""`sftx push` uploads the result of a run, or an export, to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from sftx.cli.run_argument import RunPath
from sftx.errors import counted, printable
from sftx.phases import phase


@click.command()
@click.argument("place", metavar="RUN|DIR", type=RunPath())
@click.argument("repository", metavar="REPO")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and ask nobody.")
@click.option("--base", metavar="REPO", help="Hub id of the base model, where the files name a directory.")
def command(place: Path, repository: str, private: bool, dry_run: bool, base: str | None) -> None:
    """Upload the result of RUN, or DIR with an adapter, a model or an export, to REPO (owner/name) of the hub.

    The token is that of `hf auth login`, or of the environment variable HF_TOKEN. States of optimizers and checkpoints
    are left out.
    """
    from sftx.checkpoint import pushing

    pushing.check_name(repository)
    if base is not None:
        pushing.check_name(base)
    upload = pushing.collect(pushing.find_artefact(place), base=base)
    total = f"{counted(len(upload.files), 'file')}, {sum(map(upload.size, upload.files)) / 1e6:,.1f} MB"
    if dry_run:
        for name in upload.files:
            click.echo(printable(f"{upload.size(name):>14,}  {name}"))
        kind = "private" if private else "public"
        click.echo(printable(f"would upload {total} of {upload.directory} to {repository}, made {kind} if it is new"))
        return
    with phase("uploading", total):
        address = pushing.push(upload, repository, private=private)
    click.echo(printable(f"uploaded {total} to {address}"))
