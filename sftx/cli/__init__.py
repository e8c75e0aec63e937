"""The command `sftx`. Each command lives in a file of its own, imported when it is used."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import click

from sftx import __version__
from sftx.distributed import process_group, signals
from sftx.distributed.process_group import LostPeerError
from sftx.distributed.signals import Stop
from sftx.errors import SftxError, one_line, printable

_COMMANDS: Final[Mapping[str, str]] = {
    "run": "Fine-tune a model.",
    "inspect": "Show what a run would train on, token by token.",
    "report": "Write a page on what came of a run, or of several.",
    "doctor": "Look for what is wrong with a run, before it trains.",
    "data": "Convert the data of a run.",
    "plan": "Tell what memory and time a run needs, before it is begun.",
    "plugins": "List plugins and describe them.",
    "bench": "Measure the kernels against torch and every installed peer.",
}
"""Each command, which is `command` in the module of its name, with the line that `--help` shows for it."""


_LAUNCHER_S: Final = 1.0
"""What started the processes tells better why one of them is gone, and ends the others in this time."""


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
        _show_notes()
        if not process_group.is_rank0():
            os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
            warnings.simplefilter("ignore")  # the main process has the same
        signals.install_handlers()
        try:
            return super().invoke(ctx)
        except SftxError as error:
            if ctx.params.get("debug"):
                raise
            _fail(one_line(error, max_chars=2000), error)
        except click.UsageError as error:
            raise click.UsageError(printable(error.format_message()), error.ctx) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click knows how to end by these; the last is that the reader of a pipe has had enough
        except OSError as error:  # a full disk behind stdout, a directory that is gone
            if ctx.params.get("debug"):
                raise
            _fail(f"{type(error).__name__}: {one_line(error)}")
        except Stop as stop:
            signals.ignore_signals()
            with contextlib.suppress(OSError, ValueError):  # of a terminal that is gone
                if process_group.is_rank0():
                    click.echo(f"sftx: {printable(str(stop))}", err=True)
            sys.exit(stop.exit_code)
        except KeyboardInterrupt:
            click.echo("sftx: interrupted", err=True)
            sys.exit(130)
        except Exception:
            if not process_group.is_launched():
                raise
            traceback.print_exc()
            sys.exit(process_group.UNEXPECTED)


def _fail(line: str, error: SftxError | None = None) -> NoReturn:
    """Ends the process; of several the main one tells what is wrong in all, another one only what is wrong in it."""
    if isinstance(error, LostPeerError):
        signals.ignore_signals()  # what started the processes ends them, and the exit code is decided
        time.sleep(_LAUNCHER_S)
    launcher_reports = isinstance(error, LostPeerError) and process_group.LAUNCHER_REPORTS in os.environ
    if process_group.is_rank0() and not launcher_reports:
        click.echo(f"sftx: error: {printable(line)}", err=True)
    elif error is not None and error.rank is not None and not (error.is_shared or isinstance(error, LostPeerError)):
        click.echo(f"sftx: error: rank {error.rank}: {printable(line)}", err=True)
    sys.exit(error.exit_code if isinstance(error, LostPeerError) else 1)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _show_notes() -> None:
    """Only our own messages: the libraries' loggers have handlers of their own."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable())
    for name in ("sftx", "sftx_plugins"):
        notes = logging.getLogger(name)
        notes.setLevel(logging.INFO if process_group.is_rank0() else logging.ERROR)
        notes.handlers = [handler]


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sftx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Supervised fine-tuning of language models, assembled from plugins."""
