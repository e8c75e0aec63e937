"""The command `sftx`. Each command lives in a file of its own, imported when it is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, Final

import click

from sftx import __version__
from sftx.errors import SftxError, one_line, printable

_COMMANDS: Final[Mapping[str, str]] = {
    "run": "Fine-tune a model.",
    "plugins": "List plugins and describe them.",
    "bench": "Measure the kernels against torch and every installed peer.",
}
"""Each command, which is `command` in the module of its name, with the line that `--help` shows for it."""


class _Lazy(click.Group):
    """Imports a command's module when it is invoked, so that `--help` and completion stay quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"sftx.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SftxError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"sftx: error: {printable(one_line(error, max_chars=2000))}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("sftx: interrupted", err=True)
            sys.exit(130)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sftx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Supervised fine-tuning of language models, assembled from plugins."""
