"""`sftx run`: every option of a run file, under its own name, on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

import click

from sftx.cli.options import RunCommand, run_options
from sftx.config import loading
from sftx.errors import ConfigError, printable
from sftx.phases import phase

_ARGUMENTS: Final = "sftx.run.arguments"
"""The key of click's context under which the command's arguments are kept."""


class _KeepsArguments(RunCommand):
    """A command whose arguments can be read again: with --nproc they are given to every rank."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)


def _parse_nproc(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return the number of processes, 0 for one per GPU."""
    if value is None or value == "gpu":
        return None if value is None else 0
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a number from 1 on nor gpu, for one process a GPU.")
    return int(value)


@click.command(cls=_KeepsArguments)
@run_options("data", "train", "generation")
@click.option(
    "--resume", is_flag=True, help="Continue the run from its last checkpoint; begin it when there is none yet."
)
@click.option(
    "--nproc",
    metavar="N|gpu",
    callback=_parse_nproc,
    help="Start N processes on this host, as torchrun does; gpu: one per GPU.",
)
@click.option(
    "--launch",
    metavar="TOOL",
    type=click.Choice(["slurm", "skypilot", "kubernetes"]),
    help="Write what slurm, skypilot or kubernetes starts this run with, by `launch:` of the run file.",
)
@click.option("--submit", is_flag=True, help="With --launch: submit it too.")
@click.option("--dry-run", is_flag=True, help="Print the complete run file that these options mean, and train nothing.")
@click.option(
    "--max-restarts",
    metavar="R",
    type=click.IntRange(min=0),
    help="With --nproc: restart up to R times from the last checkpoint when a process was killed.  [default: 0]",
)
def command(
    file: Path | None,
    loaded: loading.LoadedConfig,
    *,
    resume: bool,
    nproc: int | None,
    max_restarts: int | None,
    launch: str | None,
    submit: bool,
    dry_run: bool,
) -> None:
    """Fine-tune a model with the options of RUN_FILE (YAML) and of the command line, which win.

    With neither a run file nor data, it trains the embedded model on the embedded data.
    """
    if submit and launch is None:
        raise click.UsageError("--submit goes with --launch, which names what it is submitted to")
    if launch is not None:
        _launch_elsewhere(file, loaded, launch, submit=submit, others={"--nproc": nproc, "--dry-run": dry_run or None})
        return
    if dry_run:
        from sftx.cli.dry_run import complete_run_file

        click.echo(printable(complete_run_file(loaded)), nl=False)
        return
    name = loading.default_name(file, loaded.config)
    if nproc is not None:
        sys.exit(_launch(loaded, name, resume=resume, nproc=nproc, max_restarts=max_restarts or 0))
    if max_restarts is not None:
        raise click.UsageError("--max-restarts goes with --nproc; torchrun restarts the processes that it starts")

    from sftx.training import run

    run(loaded, name=name, resume=resume)


def _launch_elsewhere(
    file: Path | None, loaded: loading.LoadedConfig, tool: str, *, submit: bool, others: Mapping[str, object]
) -> None:
    """Write the file with which a scheduler starts this command, and submit it if that is asked for."""
    from sftx.cli.launching import launch_elsewhere

    if wrong := next((option for option, value in others.items() if value is not None), None):
        raise click.UsageError(f"--launch and {wrong} exclude each other; leave one out")
    typed = click.get_current_context().meta[_ARGUMENTS]
    arguments = without_options([one for one in typed if one not in ("--submit", "--resume")], "--launch")
    launch_elsewhere(file, loaded, tool, arguments, submit=submit)


def _launch(loaded: loading.LoadedConfig, name: str, *, resume: bool, nproc: int, max_restarts: int) -> int:
    """Start this command as `nproc` ranks; return the exit code."""
    from sftx.assembly.registry import activate
    from sftx.checkpoint import remote_runs, run_directory

    if not hasattr(os, "killpg"):  # by which the supervisor ends the processes of a rank
        raise ConfigError(
            "--nproc: this system cannot start several processes as one run; on Windows run sftx in WSL, "
            "or leave --nproc out"
        )
    ctx = click.get_current_context()
    if nproc and not resume:
        loaded.config.train.resolve_batch_size(nproc)
    activate(loaded)  # an error in plugins or their options is printed here, and once
    with phase("importing", "torch"):
        from sftx.distributed import launch

    arguments = without_options(ctx.meta[_ARGUMENTS], "--nproc", "--max-restarts")
    debug = ["--debug"] if ctx.find_root().params.get("debug") else []
    use_cpu = loaded.config.train.use_cpu
    if remote_runs.output_place(loaded.config).is_staged:
        reserved: AbstractContextManager[str] = nullcontext(str(loaded.config.output_dir))  # rank 0 looks at the store
    else:
        reserved = run_directory.reserve(loaded.config.output_dir, name, resume_run=resume)
    with reserved as directory:
        arguments = [*debug, "run", "--output-dir", directory, *arguments]
        return launch.launch(_sftx_command(arguments), nproc=nproc or None, max_restarts=max_restarts, use_cpu=use_cpu)


def _sftx_command(arguments: Sequence[str]) -> list[str]:
    """Return the command `sftx` with these arguments, run so that it finds the modules that this process finds."""
    cwd_is_searched = os.getcwd() in sys.path or "" in sys.path  # with -m it always is, with the script `sftx` not
    return [sys.executable, *([] if cwd_is_searched else ["-P"]), "-m", "sftx", *arguments]


def without_options(arguments: Sequence[str], *names: str) -> list[str]:
    """Return the arguments of a command line without these options, which take a value each."""
    kept: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, _ = argument.partition("=")
        if name.replace("_", "-") not in names:
            kept.append(argument)
        elif not equals:
            next(remaining, None)
    return kept
