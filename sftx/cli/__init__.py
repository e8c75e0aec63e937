"""The command line `sftx`: one module for each command, imported when the command is used. May import every package."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from sftx import __version__
from sftx.display import shown_phases
from sftx.distributed import process_group, signals
from sftx.distributed.process_group import LostPeerError
from sftx.distributed.signals import Stop
from sftx.errors import PluginError, SftxError, one_line, printable

if TYPE_CHECKING:
    from sftx.assembly.entry_points import PluginInfo

log = logging.getLogger(__name__)

BUILT_IN: Final[Mapping[str, str]] = {
    "init": "Write a first run file for a model and some data.",
    "run": "Fine-tune a model.",
    "inspect": "Show what a run would train on, token by token.",
    "chat": "Talk to a trained model.",
    "generate": "Let a trained model answer the rows of a file.",
    "evaluate": "Compute loss and scores of a trained model.",
    "serve": "Serve trained models over OpenAI's HTTP interface.",
    "merge": "Fold the adapters of a run into its base model.",
    "export": "Write a trained model in another format.",
    "push": "Upload a trained model to the Hugging Face hub.",
    "upload": "Copy a run directory to a store, such as s3://.",
    "report": "Write a report on one run, or compare several.",
    "doctor": "Check the data and options of a run before it trains.",
    "data": "Convert the data of a run.",
    "migrate": "Write the run file of another tool's configuration.",
    "plan": "Estimate the memory and time of a run before it starts.",
    "verify": "Prove on a few steps of a run that it keeps what sftx promises.",
    "plugins": "List plugins and describe them.",
    "bench": "Measure the kernels against torch and every installed peer.",
}
"""The commands and the line that `--help` shows for each; `command` in the module of the same name implements it."""

_LAUNCHER_S: Final = 1.0
"""Seconds in which a launcher ends the other ranks after one was lost; it reports the cause better than they can."""


class _Lazy(click.Group):
    """A group of commands that imports the module of a command when it is invoked, so that `--help` stays quick.

    Installed packages add commands of their own by entry points of the group `sftx.commands`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*BUILT_IN, *dict.fromkeys(info.name for info in _installed_commands())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Raises PluginError for a command of an installed package that cannot be imported, or of two packages."""
        installed = _installed_commands(cmd_name)
        if cmd_name in BUILT_IN:
            command: click.Command = importlib.import_module(f"sftx.cli.{cmd_name}").command
            return command
        if not installed:
            return None
        from sftx.assembly.discovery import load_command
        from sftx.assembly.entry_points import find

        try:
            return load_command(find(cmd_name, installed))
        except PluginError:
            if ctx.resilient_parsing:  # a shell asks for completions
                return None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(BUILT_IN.items()))
        if rows := [
            (info.name, f"{info.package}: {info.headers.get('Summary', '')}") for info in _installed_commands()
        ]:
            with formatter.section("Commands of installed packages"):
                formatter.write_dl([(printable(name), printable(text)) for name, text in rows])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the names of commands without importing them."""
        helps = {info.name: info.headers.get("Summary", "") for info in _installed_commands()} | dict(BUILT_IN)
        commands = [CompletionItem(name, help=text) for name, text in helps.items() if name.startswith(incomplete)]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _replace_unencodable()
        _configure_logging()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; every error that a user can cause ends the process with one line and an exit code."""
        signals.install_handlers()
        try:
            with shown_phases() if process_group.is_rank0() else contextlib.nullcontext():
                return super().invoke(ctx)
        except click.UsageError as error:
            # The choices of an option that is missing come one a line.
            raise click.UsageError(printable(" ".join(error.format_message().split())), error.ctx) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click itself ends the process; a broken pipe means that its reader has closed it
        except (SftxError, OSError) as error:  # OSError: stdout on a full disk, a directory that was removed
            if ctx.params.get("debug"):
                raise
            _print_error(error)
            sys.exit(error.exit_code if isinstance(error, SftxError) else 1)
        except KeyboardInterrupt as error:  # Stop, or a plain one where signals are not handled here
            signals.ignore_signals()
            with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
                if process_group.is_rank0():
                    click.echo(f"sftx: {printable(str(error)) or 'interrupted'}", err=True)
            sys.exit(error.exit_code if isinstance(error, Stop) else 130)
        except Exception as error:
            if not process_group.is_launched():
                name = ctx.invoked_subcommand
                owner = None if name is None else next(iter(_installed_commands(name)), None)
                if owner is None or ctx.params.get("debug"):
                    raise
                problem = f"{type(error).__name__}: {one_line(error)}"
                _print_error(PluginError(f"{owner}: failed: {problem}; sftx --debug {name} shows where"))
                sys.exit(1)
            traceback.print_exc()
            sys.exit(process_group.UNEXPECTED)


def _installed_commands(name: str | None = None) -> list[PluginInfo]:
    """Return the commands of installed packages, or those of this name. Warn of those that sftx's own commands hide."""
    from sftx.assembly.entry_points import COMMANDS, discover

    found = discover(COMMANDS, only=name)
    for info in found:
        if info.name in BUILT_IN:
            log.warning("%s is ignored: sftx has a command of this name", info)
    return [info for info in found if info.name not in BUILT_IN]


def _print_error(error: SftxError | OSError) -> None:
    """Print one line. Rank 0 prints every error; another rank only its own error that rank 0 does not know of."""
    if isinstance(error, LostPeerError):
        signals.ignore_signals()  # the launcher sends SIGTERM, and the exit code is decided already
        time.sleep(_LAUNCHER_S)
        if process_group.LAUNCHER_REPORTS in os.environ:
            return
    from sftx.config.unknown_options import UnknownOptionsError

    message = str(error) if isinstance(error, UnknownOptionsError) else one_line(error, max_chars=2000)
    if isinstance(error, OSError):
        message = f"{type(error).__name__}: {one_line(error)}"
    if process_group.is_rank0():
        click.echo(f"sftx: error: {printable(message)}", err=True)
    elif isinstance(error, SftxError) and error.rank is not None and not error.is_shared:
        click.echo(f"sftx: error: rank {error.rank}: {printable(message)}", err=True)


_PLAIN: Final = str.maketrans("«»⏎⇥␍⍽·…×⟨⟩→▁▂▃▄▅▆▇█", "<>$^^_.~x()>_.:-=+*#")
"""What stands for the signs of our own output on a console that lacks them, such as one in ASCII or Latin-1."""


def _replace_unencodable() -> None:
    """Let both streams replace what their encoding lacks, so that no command fails on a console that is not UTF-8."""

    def replace(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        signs = error.object[error.start : error.end].translate(_PLAIN)
        return "".join(sign if sign.isascii() else "?" for sign in signs), error.end

    codecs.register_error("sftx-replace", replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="sftx-replace")


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _StderrHandler(logging.Handler):
    """Prints on what is sys.stderr at that time: a live display replaces it, and prints above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is closed
            print(self.format(record), file=sys.stderr, flush=True)


def _configure_logging() -> None:
    """Print the log of sftx on stderr; the loggers of libraries have handlers of their own, which only rank 0 keeps."""
    handler = _StderrHandler()
    handler.setFormatter(_Printable())
    for name in ("sftx", "sftx_plugins"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if process_group.is_rank0() else logging.ERROR)
        logger.handlers = [handler]
    if process_group.LAUNCHER_REPORTS in os.environ:  # the launcher has read the options, and has said what to say
        logging.getLogger("sftx.config").setLevel(logging.ERROR)
    if not process_group.is_rank0():
        os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        warnings.simplefilter("ignore")


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sftx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Supervised fine-tuning of language models, assembled from plugins."""
