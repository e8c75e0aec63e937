"""`sftx run`: every option of a run file, under its own name, on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

from sftx.cli.options import run_options
from sftx.config import loading, options

_ARGUMENTS: Final = "sftx.run.arguments"


class _Run(click.Command):
    """Keeps what was given: with --nproc other processes are started with it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)


def _number(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """How many processes; 0 for one a GPU."""
    if value is None or value == "gpu":
        return None if value is None else 0
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a number from 1 on nor gpu, for one process a GPU.")
    return int(value)


@click.command(cls=_Run)
@run_options("data", "train", "generation")
@click.option("--resume", is_flag=True, help="Go on with this run where it was interrupted; begin it if it was not.")
@click.option(
    "--nproc",
    metavar="N|gpu",
    callback=_number,
    help="Start so many processes on this host, as torchrun does; gpu: one for each GPU.",
)
@click.option(
    "--max-restarts",
    metavar="R",
    type=click.IntRange(min=0),
    help="With --nproc: start again, from the last checkpoint, when a process was killed.  [default: 0]",
)
def command(
    file: Path | None, loaded: loading.Loaded, *, resume: bool, nproc: int | None, max_restarts: int | None
) -> None:
    """Fine-tune a model as RUN_FILE (YAML) and the options say; the options win.

    With neither a run file nor data, it trains the embedded model on the embedded data.
    """
    name = _name(file, loaded.config)
    if nproc is not None:
        sys.exit(_launch(loaded, name, resume=resume, nproc=nproc, max_restarts=max_restarts or 0))
    if max_restarts is not None:
        raise click.UsageError("--max-restarts goes with --nproc; a process that torchrun starts is its own to restart")

    from sftx.run import run

    run(loaded, name=name, resume=resume)


def _launch(loaded: loading.Loaded, name: str, *, resume: bool, nproc: int, max_restarts: int) -> int:
    """Starts the same command as `nproc` ranks; returns its exit code."""
    from sftx.assembly.registry import activate
    from sftx.distributed import launch

    ctx = click.get_current_context()
    if nproc and not resume:
        loaded.config.train.resolve_batch_size(nproc)
    activate(loaded)  # what is wrong with plugins and their options is told here, once
    arguments = launch.without_options(ctx.meta[_ARGUMENTS], "--nproc", "--max-restarts")
    debug = ["--debug"] if ctx.find_root().params.get("debug") else []
    with launch.output_dir(loaded.config.output_dir, name, resume=resume) as directory:
        command = launch.sftx_command([*debug, "run", "--output-dir", directory, *arguments])
        return launch.launch(
            command, nproc=nproc or None, max_restarts=max_restarts, use_cpu=loaded.config.train.use_cpu
        )


def _name(file: Path | None, loaded: options.RunConfig) -> str:
    """What the default output directory is called after: the run file, or the first file of data."""
    source = str(file) if file is not None else next((source.path for source in loaded.data.train), "run")
    if source.startswith("sftx:"):
        return "demo"
    return Path(source).name.split(".")[0] or "run"
