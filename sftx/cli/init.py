"""`sftx init`: five questions, and a run file that fits the data and the device."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sftx import atomic_files
from sftx.config import run_file
from sftx.config.commented import commented
from sftx.config.options import EMBEDDED_MODEL
from sftx.errors import ConfigError, OutputError, SftxError, one_line, printable
from sftx.model import names
from sftx.phases import phase

if TYPE_CHECKING:
    from sftx.inspection.first_run.proposal import Proposal
    from sftx.inspection.first_run.sampled_rows import Objective, SampledRows
    from sftx.inspection.memory_plan.target_device import TargetDevice

_PURPOSES: Final[dict[str, str]] = {
    "sft": "answer like the answers in the data",
    "dpo": "prefer the better answer of each pair",
    "kto": "answer like the good answers, and not like the bad ones",
    "grpo": "get better on its own answers, which are compared with those in the data",
}


@click.command()
@click.argument("file", metavar="[RUN_FILE]", default=Path("run.yaml"), type=click.Path(path_type=Path))
@click.option("--model", metavar="DIR|HUB_ID", help=f"Model to train.  [default: {EMBEDDED_MODEL}, embedded]")
@click.option("--data", metavar="PATH", multiple=True, help="Training rows: file, pattern, directory or hub dataset.")
@click.option(
    "--gpu", metavar="SIZE|NAME|cpu", help="Device to train on, as in sftx plan.  [default: that of this machine]"
)
@click.option(
    "--for", "purpose", type=click.Choice(list(_PURPOSES)),
    help="What for: imitate answers (sft), prefer the better of two (dpo), learn from labels (kto), "
    "or from rewards (grpo).  [default: by the data]",
)  # fmt: skip
@click.option("--output-dir", metavar="DIR", help="Where the result goes.  [default: runs/<name>-<n>]")
@click.option("--eval-data", metavar="PATH", multiple=True, help="Held-out rows; by default a tenth of the rows.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: take the defaults for what no option says.")
@click.option("--overwrite", is_flag=True, help="Replace RUN_FILE if it exists.")
def command(
    *,
    file: Path,
    model: str | None,
    data: tuple[str, ...],
    gpu: str | None,
    purpose: str | None,
    output_dir: str | None,
    eval_data: tuple[str, ...],
    yes: bool,
    overwrite: bool,
) -> None:
    """Write RUN_FILE (run.yaml) for a model and some data: five questions, each of which an option answers too.

    It looks at the rows and at the device, chooses plugins, lengths and batch sizes such that `sftx plan` says that the
    run fits, and writes beside each option why it has its value. No weights are read.
    """
    asks = not yes and _is_terminal()
    if not data and not asks:
        raise click.UsageError("--data is missing: name the file of your rows")
    _check_file(file, overwrite=overwrite)
    if asks:
        click.echo("Five questions. Enter takes what stands in brackets.\n", err=True)
    ask = _Questions(asks)
    model = ask("Model: a directory or a hub id", model, EMBEDDED_MODEL, _checked_model)
    rows = ask("Data: a file, a directory or a hub dataset", data or None, None, _looked_at)
    _say(_rows_in_words(rows))
    device = ask("GPU: cpu, or a GPU's memory or name, such as 24GB or h100", gpu, _Default(_own(), None), _device)
    purposes = _purposes(rows)
    for name in purposes if asks and purpose is None else ():
        _say(f"{name}: {_PURPOSES[name]}")
    objective = ask("What for", purpose, purposes[0], lambda text: _objective(text, rows))
    place = ask("Where the result goes", output_dir, _Default(f"runs/{file.stem}-1, -2, ...", None), lambda text: text)
    with phase("importing", "torch and transformers"):
        from sftx.inspection.first_run.proposal import Chooser

    proposal = Chooser(model, rows, device, objective, eval_data, place).choose()
    _write(file, proposal)
    _print(file, proposal)


# --- questions ------------------------------------------------------------------------------------


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


class _Default:
    """A default answer that is shown in other words than it is taken."""

    def __init__(self, shown: str, value: Any) -> None:
        self.shown, self.value = shown, value

    def __str__(self) -> str:
        return self.shown


class _Questions:
    """Asks on the terminal what no option has answered; on a wrong answer it asks again."""

    def __init__(self, asks: bool) -> None:
        self._asks, self._number = asks, 0

    def __call__(self, text: str, given: Any, default: Any, read: Callable[[Any], Any]) -> Any:
        """Return what `read` makes of the answer. Raises SftxError for a wrong option."""
        self._number += 1
        if given is not None or not self._asks:
            return read(given if given is not None else default.value if isinstance(default, _Default) else default)
        while True:
            answer = click.prompt(
                f"{self._number}/5  {text}", default=default, err=True, value_proc=lambda value: value
            )
            try:
                return read(answer.value if isinstance(answer, _Default) else answer)
            except SftxError as error:
                click.secho(f"     {printable(one_line(error, max_chars=600))}", fg="red", err=True)


def _say(text: str) -> None:
    click.secho(f"     {printable(text)}", dim=True, err=True)


def _checked_model(name: str) -> str:
    names.check(name)
    return name


def _looked_at(paths: str | Sequence[str]) -> SampledRows:
    with phase("importing", "plugins"):
        from sftx.inspection.first_run.sampled_rows import look_at

    return look_at((paths,) if isinstance(paths, str) else tuple(paths))


def _rows_in_words(rows: SampledRows) -> str:
    from sftx.inspection.first_run.sampled_rows import in_words

    return in_words(rows)


def _device(text: str | None) -> TargetDevice:
    from sftx.inspection.first_run.found_device import find

    return find(text)


def _own() -> str:
    """Return the device of this machine in words."""
    device = _device(None)
    return "cpu" if not device.is_gpu else f"{device.name}, {(device.num_bytes or 0) / 1e9:.0f} GB"


def _purposes(rows: SampledRows) -> tuple[Objective, ...]:
    from sftx.inspection.first_run.sampled_rows import OBJECTIVES

    return OBJECTIVES[rows.kind]


def _objective(text: str, rows: SampledRows) -> Objective:
    for objective in _purposes(rows):
        if objective == text.strip().lower():
            return objective
    raise ConfigError(f"--for {text}: {_rows_in_words(rows)} is for {' or '.join(_purposes(rows))}")


# --- the file -------------------------------------------------------------------------------------


def _check_file(file: Path, *, overwrite: bool) -> None:
    if file.suffix not in (".yaml", ".yml"):
        raise click.UsageError(f"{file}: a run file is YAML; give it a name that ends in .yaml")
    if (file.exists() or file.is_symlink()) and not overwrite:
        raise OutputError(f"{file}: exists already; give another name, or --overwrite")
    parent = next(path for path in file.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{file}: cannot be written: {parent} is no directory that you may write into")


def _write(file: Path, proposal: Proposal) -> None:
    head = (
        "# A run of sftx, written by `sftx init`. Options that are not here have their defaults, which\n"
        f"# `sftx run {shlex.quote(str(file))} --dry-run` shows.\n"
        f"# {proposal.fits}\n\n"
    )
    text = head + commented(proposal.values, proposal.reasons)
    values, _ = run_file.parse(text)
    assert values == proposal.values
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {one_line(error)}") from error
    atomic_files.write_text(file, text)


def _print(file: Path, proposal: Proposal) -> None:
    name = shlex.quote(str(file))
    click.echo(printable(f"\nwrote {file}: {', '.join(proposal.values['plugins'])}; {proposal.fits}"))
    click.echo("\nnext:")
    for line, what in (
        (f"sftx inspect {name}", "rows as coloured tokens: which are trained"),
        (f"sftx run {name}", "train"),
    ):
        click.echo(printable(f"  {line:<32}  # {what}"))
