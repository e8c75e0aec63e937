"""`sftx plugins new`: a package for a plugin of one's own, complete but for what it is to do."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from sftx.errors import printable
from sftx.scaffold import HOOKS, write_package


@click.command()
@click.argument("name")
@click.option("--hook", type=click.Choice(HOOKS), required=True, help="The stage of a run that the plugin fills.")
@click.option(
    "--directory",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Where the package's own directory, sftx-NAME, is made.  [default: here]",
)
def command(name: str, hook: str, directory: Path) -> None:
    """Write the package of a new plugin NAME, which installs and passes its tests as it stands.

    One method of it, marked `# Yours:`, says what the plugin does.
    """
    package, *files = write_package(name, hook, directory)
    for file in files:
        click.echo(printable(str(file)))
    click.echo("")
    click.echo(printable(shlex.join(["python", "-m", "pip", "install", "--editable", f"{package}[dev]"])))
    click.echo(printable(shlex.join(["python", "-m", "pytest", str(package)])))
    click.echo(shlex.join(["sftx", "plugins", "check", package.name.removeprefix("sftx-")]))
