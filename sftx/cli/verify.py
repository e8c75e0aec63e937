"""`sftx verify`: prove on a few steps of a run that it keeps what sftx promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sftx.cli.options import RunCommand, run_options
from sftx.config import loading
from sftx.errors import counted
from sftx.phases import phase
from sftx.verify.findings import CHECKS

if TYPE_CHECKING:
    from sftx.verify.findings import Verification

_WIDTH: Final = 80
_STATUS_CELLS: Final = 13
_CHECK_CELLS: Final = 14
_COLOURS: Final = {"passed": "green", "failed": "red", "not checked": "yellow"}


@click.command(cls=RunCommand)
@run_options("data", "train", "generation")
@click.option(
    "--steps", metavar="N", type=click.IntRange(3, 1000), default=4, show_default=True,
    help="Optimizer steps of each short run.",
)  # fmt: skip
@click.option(
    "--only", metavar="CHECK", multiple=True, type=click.Choice(list(CHECKS)),
    help="Make this check alone; repeat for more.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Write the report as one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    file: Path | None,
    loaded: loading.LoadedConfig,
    steps: int,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Prove on a few steps of RUN_FILE and these options that the run keeps what sftx promises.

    The run is made in a temporary directory, killed and resumed, split in other ways, and compared with its rows and
    its plan. Nothing is written elsewhere but the cache. Exits with 1 when a check fails.
    """
    with phase("importing", "torch and transformers"):
        from sftx.verify.proof import as_json as values_of
        from sftx.verify.proof import verify

    verification = verify(loaded, steps=steps, only=only)
    if as_json:
        click.echo(json.dumps(values_of(verification), indent=1, ensure_ascii=False).encode(), nl=True)
    else:
        _print(verification, file)
    ctx.exit(0 if verification.passed else 1)


def _print(verification: Verification, file: Path | None) -> None:
    """Print the page: what was verified, a line for each check, and the verdict. It is 80 columns wide."""
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    from sftx.inspection.token_report.terminal import print_labelled

    console = Console(highlight=False, width=_WIDTH)
    for name, value in _facts(verification, file):
        print_labelled(console, Text(name, Style(dim=True)), value, indent=_STATUS_CELLS)
    console.print()
    for finding in verification.findings:
        shown = finding.status.upper() if finding.status == "failed" else finding.status
        label = Text().append(f"{shown:<{_STATUS_CELLS}}", Style(color=_COLOURS[finding.status], bold=True))
        label.append(finding.check, Style(bold=True))
        print_labelled(console, label, finding.seen, indent=_STATUS_CELLS + _CHECK_CELLS)
    for number, warning in enumerate(verification.warnings):
        label = Text("" if number else "warnings", Style(color="yellow"))
        print_labelled(console, label, warning, indent=_STATUS_CELLS)
    console.print()
    counts = {status: sum(f.status == status for f in verification.findings) for status in _COLOURS}
    words = ", ".join(f"{number} {status}" for status, number in counts.items())
    checks = counted(len(verification.findings), "check")
    console.print(f"{checks} in {verification.seconds:.0f} s: {words}", style="bold", markup=False)


def _facts(verification: Verification, file: Path | None) -> list[tuple[str, str]]:
    """Return what stands above the checks, as pairs of a name and a value."""
    run: dict[str, Any] = dict(verification.run)
    facts = [("run file", str(file))] if file is not None else []
    facts.append(("model", run["model"]) if "model" in run else ("model", "not read"))
    if "plugins" in run:
        facts.append(("plugins", ", ".join(run["plugins"]) or "the default ones"))
    if "rows" in run:
        facts.append(("data", f"{counted(run['rows'], 'row')}, {run['held_out_rows']:,} held out"))
    if "device" in run:
        facts.append(("computed", f"on {run['device']} in {run['dtype']}"))
        facts.append(("step", f"{counted(run['rows_per_step'], 'row')}, {run['micro_batch_rows']} at once"))
    if verification.speed:
        speed = verification.speed
        facts.append(("speed", f"{speed['seconds_per_step']:.3g} s a step, {speed['tokens_per_second']:,.0f} tokens/s"))
    if verification.changes:
        facts.append(("short runs", "; ".join(verification.changes)))
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in verification.versions.items())))
    return facts
