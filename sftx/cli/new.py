"""`sftx plugins new` writes a package for a new plugin, which works before anything in it is changed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from sftx.errors import printable
from sftx.scaffold import HOOKS, write_package


@click.command()
@click.argument("name")
@click.option(
    "--hook",
    "hooks",
    type=click.Choice(HOOKS),
    required=True,
    multiple=True,
    help="The hook that the plugin implements. May be given several times.",
)
@click.option(
    "--directory",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Parent of the package directory sftx-NAME.  [default: the current directory]",
)
def command(name: str, hooks: tuple[str, ...], directory: Path) -> None:
    """Write a package for a new plugin NAME. It can be installed and passes its tests before you change it.

    The method marked `# Yours:` decides what the plugin does. With several hooks there is one such method for each.
    """
    package, *files = write_package(name, hooks, directory)
    for file in files:
        click.echo(printable(str(file)))
    click.echo("")
    click.echo(printable(shlex.join(["python", "-m", "pip", "install", "--editable", f"{package}[dev]"])))
    click.echo(printable(shlex.join(["python", "-m", "pytest", str(package)])))
    click.echo(shlex.join(["sftx", "plugins", "check", package.name.removeprefix("sftx-")]))
