"""`sftx run --launch`: write the file with which Slurm, SkyPilot or Kubernetes starts a run, and submit it."""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from sftx import atomic_files
from sftx.assembly.registry import activate
from sftx.config import loading
from sftx.config.launch_options import LaunchConfig
from sftx.errors import ConfigError, OutputError, one_line, printable
from sftx.launchers.job import MARK, Job, LaunchFile

log = logging.getLogger(__name__)


def launch_elsewhere(
    file: Path | None, loaded: loading.LoadedConfig, tool: str, arguments: Sequence[str], *, submit: bool
) -> None:
    """Write the file for `tool` beside the run file, and submit it; print the commands that belong to it.

    `arguments` are those of this command, without the options of --launch. Raises SftxError for options, plugins and
    `launch:` that are wrong, before anything is written.
    """
    config = loaded.config
    if config.output_dir is None:
        raise ConfigError(
            "--launch: a job that starts again goes on in its output directory; give one with output_dir in the run "
            "file, or --output-dir"
        )
    activate(loaded)
    if file is not None:
        place = next((n for n, argument in enumerate(arguments) if Path(argument) == file), None)
        arguments = [argument for n, argument in enumerate(arguments) if n != place]
    job = Job(config, config.launch or LaunchConfig(), file, tuple(arguments), Path.cwd())
    job.check_processes()
    made: LaunchFile = importlib.import_module(f"sftx.launchers.{tool}").write(job)
    if submit:
        _check_submission(job, made, tool)
    stem = job.name if file is None else file.with_suffix("").name
    path = (Path() if file is None else file.parent) / f"{stem}.{made.suffix}"
    _write(path, made.text)
    for warning in made.warnings:
        log.warning("%s", warning)
    click.echo(printable(f"wrote {path}: {job.size}"))
    command = [*made.submit, str(path)]
    output = made.output
    if submit:
        click.echo(printable(said := _submit(command)))
        if match := re.search(r"\b\d+\b", said):
            output = [part.replace("JOB_ID", match[0]) for part in output]
    else:
        click.echo(printable(f"to submit it:   {shlex.join(command)}"))
    click.echo(printable(f"to see its state:   {shlex.join(made.state)}"))
    click.echo(printable(f"to see what it prints:   {shlex.join(output)}"))


def _check_submission(job: Job, made: LaunchFile, tool: str) -> None:
    """Raise ConfigError when the command that submits is not there, or a secret that is passed on is not set."""
    if shutil.which(made.submit[0]) is None:
        raise ConfigError(f"--submit: {made.submit[0]} is not on the path; install it, or leave --submit out")
    missing = [name for name in job.options.secrets if not os.environ.get(name)]
    if missing and tool != "kubernetes":
        raise ConfigError(f"option 'launch.secrets': {missing[0]} is not set in the environment; export it")


def _write(path: Path, text: str) -> None:
    """Write the file. Raises OutputError when another program or a person has written what is there."""
    try:
        with path.open("rb") as stream:
            is_ours = MARK.encode() in stream.read(4096)
    except FileNotFoundError:
        is_ours = True
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {one_line(error)}") from error
    if not is_ours:
        raise OutputError(f"{path}: holds something else and is not overwritten; move it away")
    atomic_files.write_text(path, text)


def _submit(command: Sequence[str]) -> str:
    """Run a command and return what it prints. Raises OutputError with its own error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise OutputError(f"{command[0]}: cannot be started: {one_line(error)}") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or "it says nothing"
        raise OutputError(f"{shlex.join(command)}: failed with exit code {done.returncode}: {said[-1000:]}")
    return (done.stdout or done.stderr).strip()
