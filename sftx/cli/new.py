"""`sftx plugins new` writes a package for a new plugin, which works before anything in it is changed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from sftx.cli import BUILT_IN
from sftx.errors import ConfigError, printable
from sftx.scaffold import COMMAND, HOOKS, write_package


@click.command()
@click.argument("name")
@click.option(
    "--hook",
    "hooks",
    type=click.Choice([*HOOKS, COMMAND]),
    required=True,
    multiple=True,
    help="The hook that the plugin implements. May be given several times. `command`: a command `sftx NAME`.",
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
    if COMMAND in hooks and name.removeprefix("sftx-") in BUILT_IN:
        raise ConfigError(f"{name!r} is a command of sftx itself; choose another name")
    package, *files = write_package(name, hooks, directory)
    for file in files:
        click.echo(printable(str(file)))
    click.echo("")
    click.echo(printable(shlex.join(["python", "-m", "pip", "install", "--editable", f"{package}[dev]"])))
    click.echo(printable(shlex.join(["python", "-m", "pytest", str(package)])))
    name = package.name.removeprefix("sftx-")
    click.echo(shlex.join(["sftx", name, "--help"] if COMMAND in hooks else ["sftx", "plugins", "check", name]))
